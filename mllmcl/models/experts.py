"""Expert layers: a frozen linear with a stack of LoRA experts, and a projector linear of which each expert owns a copy.

All layers of a model share one `ExpertState`. It says how many experts there are and which of them act now; the mixing
itself is `mllmcl_kernels.lora_mix` and `lora_mix_routed`.
"""

# B samples, S positions, K in, N out, E experts, R sum of ranks, M images, P rows of an image, G groups of layers

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllmcl_kernels import Routing, lora_mix, lora_mix_routed, route

if TYPE_CHECKING:
    from .sharing import SharedInput

__all__ = ["ExpertLinear", "ExpertProjectorLinear", "ExpertState", "Selection", "select"]

SCORES = ("softmax", "sigmoid", "cosine")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which experts act, and on what, during one forward pass. Made by `select`.

    gates: None (learned router if there is one, else every expert weighs 1), float `[E]` or `[B, E]`, or int64 `[B]`.
    uniform: the expert of every sample where that is known on the host; -1 is the base model.
    groups: gates and uniform of each group of layers, where those differ.
    token_mask: bool `[B, S]`, False where a position must not count in routing statistics.
    prompt_mask: bool `[B, S]`, True at positions of the prompt; for the layers' gatings.
    features: `[B, d]`, what `ExpertState.sample_features` knows of each sample; for the layers' gatings.
    memory: what layers keep from the first pass of a generation to the next ones, by name; None outside of it.
    image_index: int64 `[M]`, the sample of each image; None means one image for each sample in order.
    image_rows: projector rows of each image where they come packed.
    """

    gates: Tensor | None = None
    uniform: int | None = None
    groups: tuple[Selection, ...] | None = None
    token_mask: Tensor | None = None
    prompt_mask: Tensor | None = None
    features: Tensor | None = None
    memory: dict[str, Tensor] | None = None
    image_index: Tensor | None = None
    image_rows: tuple[int, ...] | None = None

    def of_group(self, group: int) -> Selection:
        """What acts in the layers of a group."""
        return self if self.groups is None else self.groups[group]

    def gates_for(self, x: Tensor) -> Tensor | None:
        """The gates with dimensions of size 1 put in, so that they broadcast over the positions of `x`."""
        gates = self.gates
        if gates is None or (gates.is_floating_point() and gates.dim() == 1):
            return gates
        return gates.view(gates.shape[0], *[1] * (x.dim() - 2), *gates.shape[1:])


@dataclass(kw_only=True)
class ExpertState:
    """What all expert layers of a model share.

    ranks, scaling, trainable: one entry for each expert, scaling = alpha / rank.
    dropout: on the input of the LoRA path, in training mode only.
    router: score of the learned in-layer router, "softmax", "sigmoid" or "cosine"; None without one.
    router_top_k: experts kept for each token; None keeps all.
    router_options: further keyword arguments of `mllmcl_kernels.lora_mix_routed`.
    router_share: where floats are given although there is a learned router, gates = share * learned + (1 - share) *
        given; at 0 the router is not asked.
    sample_features: `samples -> float [B, d]`, told to the layers' gatings with every batch; None tells them nothing.
    collect: keep the last `Routing` of each layer in `routings`, for auxiliary losses and load statistics.
    num_merged: how often the experts were merged into the base weights.
    groups: layer name to the group whose row of gates `[B, G, E]` it takes; layers not named are in group 0.
    resident: the one expert that acts where no gates are given; None: the learned router or every expert. `settle`.
    by_columns: whether B lies in memory column by column, each expert in one piece.
    """

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    trainable: tuple[bool, ...]
    dropout: float = 0.0
    router: str | None = None
    router_top_k: int | None = None
    router_options: dict = field(default_factory=dict)
    router_share: float = 0.0
    sample_features: Callable[[Sequence], Tensor] | None = None
    collect: bool = False
    routings: dict = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    num_merged: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    resident: int | None = None
    by_columns: bool = False

    def settle(self, expert: int) -> None:
        """Let this expert act wherever no gates are given."""
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert: expected one of 0..{self.num_experts - 1}, got {expert}")
        self.resident = expert
        self.selection = Selection(uniform=expert)

    @property
    def num_groups(self) -> int:
        return 1 + max(self.groups.values(), default=0)

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def gates(self) -> Tensor | None:
        return self.selection.gates

    def rows(self, expert: int) -> slice:
        """The rank rows of `expert` in a stack."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    def loads(self) -> dict[str, Tensor]:
        """Layer name to the load `[E]` of the last pass, on the device; needs `collect`."""
        return {path: routing.load.detach() for path, routing in self.routings.items()}

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep the routings of passes within the context, and let them go at its end."""
        before, self.collect = self.collect, True
        try:
            yield
        finally:
            self.collect = before
            self.routings.clear()

    @contextlib.contextmanager
    def using(self, selection: Selection) -> Iterator[None]:
        """Make `selection` the current one."""
        before, self.selection = self.selection, selection
        try:
            yield
        finally:
            self.selection = before

    def recompute_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """For activation checkpointing: recompute with the experts of the forward pass, whatever is current then."""
        collect = self.collect
        return contextlib.nullcontext(), self._recomputing(self.selection, collect)

    @contextlib.contextmanager
    def _recomputing(self, selection: Selection, collect: bool) -> Iterator[None]:
        before, self.collect = self.collect, False
        try:
            with self.using(selection):
                yield
        finally:
            self.collect = before


def select(state: ExpertState, gates, device: torch.device) -> Selection:
    """Check `gates` and bring them to `device`.

    Args:
        gates: None, "off", a float tensor `[E]`, `[B, E]` or `[B, G, E]` (a row for each group of layers), or int64 ids
            `[B]` (a tensor or a list), -1 = base alone.

    Raises:
        TypeError, ValueError: another type or shape, or, for ids on the CPU, an id outside -1..E-1.
    """
    experts = state.num_experts
    if gates is None:
        return Selection(uniform=state.resident)
    if isinstance(gates, str):
        if gates != "off":
            raise ValueError(f'gates: expected None, "off", a float tensor or integer ids, got {gates!r}')
        return Selection(uniform=-1)
    if not isinstance(gates, Tensor):
        gates = torch.as_tensor(gates)
    if gates.is_floating_point():
        wanted = gates.dim() in (1, 2) or (gates.dim() == 3 and gates.shape[1] == state.num_groups)
        if not wanted or gates.shape[-1] != experts:
            raise ValueError(
                f"gates: expected floats [E], [B, E] or [B, G, E] with E = {experts} and G = {state.num_groups}, "
                f"got {list(gates.shape)}"
            )
        return _select_groups(state, gates, device) if gates.dim() == 3 else Selection(gates=gates.to(device))
    if gates.dtype == torch.bool or gates.is_complex():
        raise TypeError(f"gates: expected floats or integer ids, got {gates.dtype}")
    if gates.dim() != 1:
        raise ValueError(f"gates: expected ids of shape [B], got {list(gates.shape)}")
    uniform = None
    if gates.device.type == "cpu" and gates.numel():
        # where the ids are on the host, a batch of one expert is known as such and needs only that expert's rows
        low, high = (int(value) for value in gates.aminmax())
        if low < -1 or high >= experts:
            raise ValueError(f"gates: expected ids in -1..{experts - 1}, got {low if low < -1 else high}")
        uniform = low if low == high else None
    return Selection(gates=gates.to(device=device, dtype=torch.int64), uniform=uniform)


def _select_groups(state: ExpertState, gates_BGE: Tensor, device: torch.device) -> Selection:
    """A selection for each group; where the gates are on the host, a group with one expert alone is known as such."""
    gates_GBE = gates_BGE.transpose(0, 1).contiguous()
    uniform = [None] * len(gates_GBE)
    if gates_GBE.device.type == "cpu" and gates_GBE.numel() and not state.router_share:
        chosen_G = gates_GBE[:, 0].argmax(-1)
        is_alone = (gates_GBE == F.one_hot(chosen_G, gates_GBE.shape[-1])[:, None]).flatten(1).all(1)
        uniform = [at if alone else None for at, alone in zip(chosen_G.tolist(), is_alone.tolist(), strict=True)]
    moved = gates_GBE.to(device).unbind(0)
    return Selection(groups=tuple(Selection(gates=one, uniform=at) for one, at in zip(moved, uniform, strict=True)))


def fresh_lora_a(num_rows: int, width: int, device: torch.device) -> Tensor:
    """A rows as PEFT draws them, Kaiming uniform with a = sqrt(5); from the CPU's generator on every device."""
    a_RK = torch.empty(num_rows, width)
    nn.init.kaiming_uniform_(a_RK, a=math.sqrt(5))
    return a_RK.to(device)


def fresh_router(num_experts: int, width: int, device: torch.device) -> Tensor:
    return torch.empty(num_experts, width).normal_(0.0, 0.02).to(device)


class ExpertLinear(nn.Module):
    """A frozen linear plus its LoRA experts, float32 and stacked in rank space.

        y = x W^T + b + ((drop(x) A^T) * G) B^T

    Holds `.weight` `[N, K]` and `.bias` of the base layer (the very parameters), `.lora_a` `[R, K]`, `.lora_b` `[N, R]`
    and `.router_weight` `[E, K]` or None. Input and output are `[B, S, K]` and `[B, S, N]`.

    Under torch.compile one graph serves all ids, and one all gates of a shape; the state's `ranks`, `scaling` and
    `trainable` are its constants. Else a batch of one expert known on the host is computed from that expert's rows.

    `.gating` is None or a module `(layer, x, selection) -> float gates that broadcast to [B, S, E]`, asked where no
    gates are given. Its parameters are saved, and train, with the learned routers.
    """

    def __init__(self, base: nn.Linear, state: ExpertState, path: str):
        super().__init__()
        self.state = state
        self.path = path
        self.weight = base.weight
        self.bias = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        device, total = base.weight.device, sum(state.ranks)
        self.lora_a = nn.Parameter(fresh_lora_a(total, self.in_features, device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, total, device=device))
        router = None if state.router is None else fresh_router(state.num_experts, self.in_features, device)
        self.router_weight = None if router is None else nn.Parameter(router)
        self.gating: nn.Module | None = None
        #: what computes this layer together with others that are given the same tensor; see `sharing`
        self.shared_input: SharedInput | None = None

    def _b_of(self, rows: slice) -> Tensor:
        """B of some rank rows; the gradient comes back laid as B is, so that nobody has to lay it anew."""
        return self.lora_b.t()[rows].t() if self.state.by_columns else self.lora_b[:, rows]

    @property
    def router_parameters(self) -> dict[str, nn.Parameter]:
        """Name to parameter of what learns to choose in this layer: the learned router and the gating."""
        found = {} if self.router_weight is None else {"router_weight": self.router_weight}
        gating = () if self.gating is None else self.gating.named_parameters(prefix="gating")
        return {**found, **dict(gating)}

    def grow(self, num_rows: int, num_experts: int) -> None:
        """Append `num_rows` rank rows of `num_experts` new experts; the old ones are copied bit for bit."""
        device = self.lora_a.device
        new_a = fresh_lora_a(num_rows, self.in_features, device)
        new_b = torch.zeros(self.out_features, num_rows, device=device)
        self.lora_a = _regrown(self.lora_a, new_a, dim=0)
        self.lora_b = _regrown(self.lora_b, new_b, dim=1)
        self.lay()
        if self.router_weight is not None:
            router = fresh_router(num_experts, self.in_features, device)
            self.router_weight = _regrown(self.router_weight, router, dim=0)

    def lay(self) -> None:
        """Lay B in memory as the state says; its values stay."""
        b_NR = self.lora_b.detach()
        self.lora_b.data = b_NR.t().contiguous().t() if self.state.by_columns else b_NR.contiguous()

    def product(self) -> Tensor:
        """What the experts add to the base weight where each weighs 1, `[N, K]`: sum_e scaling_e B_e A_e."""
        state, b_NR = self.state, self.lora_b
        scaling_R = torch.tensor(state.scaling, dtype=b_NR.dtype).repeat_interleave(torch.tensor(state.ranks))
        return (b_NR * scaling_R.to(b_NR.device)) @ self.lora_a

    @torch.no_grad()
    def merge(self) -> None:
        """Add `product()` to the base weight, rounded once to its dtype; then A is drawn anew and B is 0."""
        self.weight.add_(self.product())
        self.lora_a.copy_(fresh_lora_a(*self.lora_a.shape, self.lora_a.device))
        self.lora_b.zero_()

    def selected(self) -> tuple[Selection, int | None]:
        """What acts in this layer, and the one expert of every sample where that is known on the host."""
        state = self.state
        selection = state.selection.of_group(state.groups.get(self.path, 0))
        # a compiled graph takes ids as data, so that one graph serves every choice; only "off" has none
        is_data = selection.gates is not None and torch.compiler.is_compiling()
        return selection, None if is_data else selection.uniform

    def tensors(self, expert: int | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """weight, bias, A and B, of one expert's ranks where there is one."""
        if expert is None or self.state.num_experts == 1:
            return self.weight, self.bias, self.lora_a, self.lora_b
        rows = self.state.rows(expert)
        return self.weight, self.bias, self.lora_a[rows], self._b_of(rows)

    def options(self, expert: int | None) -> dict[str, object]:
        """What `lora_mix` wants to know of all experts, or of one."""
        state, kinds = self.state, ("ranks", "scaling", "trainable")
        one = {kind: getattr(state, kind) if expert is None else (getattr(state, kind)[expert],) for kind in kinds}
        return {**one, "dropout": state.dropout if self.training else 0.0}

    def routing_options(self, selection: Selection) -> dict[str, object]:
        """What `lora_mix_routed` wants to know of the learned router."""
        state = self.state
        return {
            "top_k": state.router_top_k,
            "score": state.router,
            "token_mask": selection.token_mask,
            **state.router_options,
        }

    def gates_for(self, x: Tensor, selection: Selection) -> Tensor | None:
        """The gates given or those of the layer's gating; None where the learned router decides, or all weigh 1."""
        state, gates = self.state, selection.gates_for(x)
        if gates is None and self.gating is not None:
            return self.gating(self, x, selection)
        if gates is not None and gates.is_floating_point() and state.router_share:
            return torch.lerp(gates, self._route(x).gates.to(gates.dtype), state.router_share)
        return gates

    def note(self, routing: Routing) -> None:
        """Keep a routing for losses and statistics where the state asks for it."""
        if self.state.collect:
            self.state.routings[self.path] = routing

    def forward(self, x: Tensor) -> Tensor:
        if self.shared_input is not None and (found := self.shared_input.output_of(self, x)) is not None:
            return found
        selection, expert = self.selected()
        if expert == -1:
            return F.linear(x, self.weight, self.bias)
        layer, options = (x, *self.tensors(expert)), self.options(expert)
        if expert is not None:
            return lora_mix(*layer, **options)
        gates = self.gates_for(x, selection)
        if gates is not None or self.router_weight is None:
            return lora_mix(*layer, gates, **options)
        y, routing = lora_mix_routed(*layer, self.router_weight, **options, **self.routing_options(selection))
        self.note(routing)
        return y

    def _route(self, x: Tensor) -> Routing:
        state = self.state
        return route(x, self.router_weight, top_k=state.router_top_k, score=state.router, **state.router_options)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, ranks={self.state.ranks}"


class ExpertProjectorLinear(nn.Module):
    """A linear of the projector of which every expert owns a full float32 copy; -1 is the frozen base.

    Holds the base `.weight` `[N, K]` and `.bias`, and `.expert_weight` `[E, N, K]`, `.expert_bias` `[E, N]` or None,
    which start as copies of the base. The input is one slice for each image, `[M, P, K]`, or the rows of all images
    packed, `[rows, K]`. Copies are chosen whole, so gates have to be ids. A batch of one expert known on the host takes
    that copy alone, also under torch.compile, which then has a graph for each such expert.
    """

    def __init__(self, base: nn.Linear, state: ExpertState, path: str):
        super().__init__()
        self.state = state
        self.path = path
        self.weight = base.weight
        self.bias = base.bias
        self.expert_weight = nn.Parameter(_copies(base.weight, state.num_experts))
        self.expert_bias = None if base.bias is None else nn.Parameter(_copies(base.bias, state.num_experts))

    def grow(self, num_experts: int) -> None:
        """Append copies of the base for `num_experts` new experts."""
        self.expert_weight = _regrown(self.expert_weight, _copies(self.weight, num_experts), dim=0)
        if self.bias is not None:
            self.expert_bias = _regrown(self.expert_bias, _copies(self.bias, num_experts), dim=0)

    def forward(self, x: Tensor) -> Tensor:
        selection = self.state.selection
        expert = selection.uniform
        is_open = selection.gates is None and selection.groups is None
        if expert is None and is_open and self.state.num_experts == 1:
            expert = 0
        if expert is not None:
            weight, bias = self._one(expert)
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if selection.gates is None or selection.gates.is_floating_point():
            raise ValueError(
                f"{self.path}: projector copies are chosen whole, so gates have to be expert ids [B], got "
                f"{'None' if is_open else 'floats'}; wrap the call in use_experts(ids)"
            )
        ids_M = selection.gates if selection.image_index is None else selection.gates[selection.image_index]
        if x.dim() == 3 and x.shape[0] == ids_M.shape[0]:
            return self._per_image(x, ids_M)
        rows = selection.image_rows
        if x.dim() == 2 and rows is not None and sum(rows) == x.shape[0]:
            x_MPK = nn.utils.rnn.pad_sequence(x.split(rows), batch_first=True)
            y_MPN = self._per_image(x_MPK, ids_M)
            return torch.cat([y[:count] for y, count in zip(y_MPN, rows, strict=True)])
        raise ValueError(
            f"{self.path}: expected [M, P, K] with M = {ids_M.shape[0]} images or packed rows {rows}, "
            f"got {list(x.shape)}"
        )

    def _one(self, expert: int) -> tuple[Tensor, Tensor | None]:
        if expert == -1:
            return self.weight, self.bias
        weight, bias = self.expert_weight[expert], None if self.bias is None else self.expert_bias[expert]
        if self.state.trainable[expert]:
            return weight, bias
        return weight.detach(), None if bias is None else bias.detach()

    def _chosen(self, stack: Tensor, base: Tensor, ids_M: Tensor) -> Tensor:
        """The copy of each image `[M, ...]`; frozen experts and the base get no gradient."""
        lead = (-1, *[1] * base.dim())
        chosen = stack.index_select(0, ids_M.clamp(min=0))
        if not all(self.state.trainable):
            trains = torch.tensor(self.state.trainable).to(ids_M.device, non_blocking=True)[ids_M.clamp(min=0)]
            chosen = torch.where(trains.view(lead), chosen, chosen.detach())
        return torch.where((ids_M < 0).view(lead), base.to(chosen.dtype), chosen)

    def _per_image(self, x_MPK: Tensor, ids_M: Tensor) -> Tensor:
        weight_MNK = self._chosen(self.expert_weight, self.weight, ids_M).to(x_MPK.dtype)
        if self.bias is None:
            return torch.bmm(x_MPK, weight_MNK.mT)
        bias_MN = self._chosen(self.expert_bias, self.bias, ids_M).to(x_MPK.dtype)
        return torch.baddbmm(bias_MN[:, None, :], x_MPK, weight_MNK.mT)


def _copies(base: Tensor, num: int) -> Tensor:
    return base.detach().float().expand(num, *base.shape).clone()


def _regrown(old: nn.Parameter, new: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.cat((old.detach(), new), dim=dim), requires_grad=old.requires_grad)


def with_batch(
    selection: Selection, token_mask: Tensor | None, image_index: Sequence[int], image_rows, **facts
) -> Selection:
    """`selection` for one batch: where its pads and images are; `facts` are further fields of it."""
    if selection.uniform is not None:
        return selection
    index = None
    if selection.gates is not None and not selection.gates.is_floating_point():
        index = torch.as_tensor(image_index, dtype=torch.int64).to(selection.gates.device, non_blocking=True)
    return replace(selection, token_mask=token_mask, image_index=index, image_rows=tuple(image_rows), **facts)
