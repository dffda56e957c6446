"""`lora_mix`: base linear plus all LoRA experts, mixed in rank space, forward and backward."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import FLOATS, expect, expect_device, expect_floating, expect_real, expect_shape, expect_tensor
from ...dropout import draw_seed
from ...op import Cost, Op
from .reference import lora_mix_backward_reference, lora_mix_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["lora_mix", "lora_mix_backward_op", "lora_mix_op"]


def _fake(x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


def _fake_backward(
    dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs
):  # fmt: skip
    like = (x, weight, dy[:1].view(-1) if dy.shape[0] else x.new_empty(weight.shape[0]), lora_a, lora_b, gates)
    outputs = []
    for need, tensor in zip(needs, like, strict=True):
        dtype = x.dtype if tensor is None or tensor is not gates else tensor.dtype
        outputs.append(x.new_empty(tensor.shape, dtype=dtype) if need else x.new_empty(0))
    if needs[4]:
        outputs[4] = torch.empty_like(lora_b, dtype=x.dtype)
    return tuple(outputs)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, lora_a, lora_b, gates, seed, ranks, scaling, trainable, dropout = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, gates, seed, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.options = (ranks, scaling, trainable, dropout)


def _backward(ctx, dy, _ds):
    if dy is None:
        return (None,) * 11
    x, weight, lora_a, lora_b, gates, seed, s = ctx.saved_tensors
    ranks, scaling, trainable, dropout = ctx.options
    wants = ctx.needs_input_grad
    some = any(trainable)
    needs = [wants[0], wants[1], wants[2], wants[3] and some, wants[4] and some, wants[5]]
    grads = lora_mix_backward_op(
        dy, x, weight, lora_a, lora_b, gates, seed, s, ranks, scaling, trainable, dropout, needs, backend=ctx.backend
    )
    return (*(grad if need else None for need, grad in zip(needs, grads, strict=True)), None, None, None, None, None)


def _cost(x, weight, bias, lora_a, lora_b, gates, *_rest) -> Cost:
    tokens, width = x.shape
    out, rank = lora_b.shape
    size = x.element_size()
    numbers = tokens * (width + out) + out * width + rank * (out + width)
    return Cost(flops=2 * tokens * (width * out + rank * (width + out)), bytes=numbers * size)


def _cost_backward(dy, x, weight, lora_a, lora_b, gates, *rest) -> Cost:
    tokens, width = x.shape
    out, rank = lora_b.shape
    size = x.element_size()
    numbers = tokens * (2 * width + out + rank) + out * width + 2 * rank * (out + width)
    return Cost(flops=2 * tokens * (width * out + 2 * rank * (width + out)), bytes=numbers * size)


lora_mix_backward_op = Op(
    name="lora_mix_backward",
    reference=lora_mix_backward_reference,
    package=__name__,
    fake=_fake_backward,
    samples=backward_samples,
    cost=_cost_backward,
)


def _examine(x, weight, bias, lora_a, lora_b, gates, seed, ranks, *_rest) -> None:
    """Range of ids on the CPU, never with a host wait elsewhere, where a wrong id selects no expert."""
    if gates is not None and not gates.is_floating_point():
        check_ids("lora_mix", gates, len(ranks))


def check_ids(op: str, ids: Tensor, experts: int) -> None:
    """ValueError with the first id on the CPU that is outside -1..E-1."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    wrong = (ids < -1) | (ids >= experts)
    if bool(wrong.any()):
        where = int(wrong.flatten().to(torch.uint8).argmax())
        expect(False, op, "gates", f"ids in -1..{experts - 1}", f"{int(ids.flatten()[where])} at position {where}")


lora_mix_op = Op(
    name="lora_mix",
    reference=lora_mix_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    examine=_examine,
    setup_context=_setup_context,
    backward=_backward,
    aside=(1,),
    autocast=("x", "weight", "bias", "lora_a", "lora_b"),
)


def resolve_ranks(op: str, ranks: Sequence[int] | None, total: int, experts: int | None) -> list[int]:
    """The ranks as a list; R / E each where none are given."""
    if ranks is None:
        experts = experts or 1
        expect(total % experts == 0, op, "ranks", f"given, since R = {total} is not a multiple of E = {experts}", None)
        return [total // experts] * experts
    ranks = [int(rank) for rank in ranks]
    expect(all(rank >= 0 for rank in ranks), op, "ranks", "non-negative integers", ranks)
    expect(sum(ranks) == total, op, "ranks", f"integers that sum to R = {total} (rows of lora_a)", ranks)
    return ranks


def resolve_per_expert(op: str, argument: str, value, experts: int, kind: type) -> list:
    """One value for each expert from a single value or a sequence."""
    if isinstance(value, (bool, int, float)):
        return [kind(value)] * experts
    values = [kind(item) for item in value]
    expect(len(values) == experts, op, argument, f"one {kind.__name__} or E = {experts} of them", values)
    return values


def resolve_experts(
    op: str, ranks: Sequence[int] | None, scaling: float | Sequence[float], trainable: Sequence[bool] | None,
    total: int, experts: int | None,
) -> tuple[list[int], list[float], list[bool]]:  # fmt: skip
    """Ranks, scalings and whether each trains, for every expert."""
    ranks = None if ranks is None else _each(op, "ranks", ranks, int, "E integers or None")
    if isinstance(scaling, Tensor) and scaling.requires_grad:
        expect(False, op, "scaling", "constant", "a tensor that requires grad: put it into gates")
    if isinstance(scaling, numbers.Real) or (isinstance(scaling, Tensor) and scaling.dim() == 0):
        scaling = float(scaling)
    else:
        scaling = _each(op, "scaling", scaling, float, "a number or E numbers")
    trainable = True if trainable is None else _each(op, "trainable", trainable, bool, "E booleans or None")
    ranks = resolve_ranks(op, ranks, total, experts)
    scaling = resolve_per_expert(op, "scaling", scaling, len(ranks), float)
    # comparisons, since a compiler traces no math.isfinite of a number that changes
    if not all(-math.inf < value < math.inf for value in scaling):
        expect(False, op, "scaling", "finite", scaling)
    return ranks, scaling, resolve_per_expert(op, "trainable", trainable, len(ranks), bool)


def _each(op: str, argument: str, values, kind: type, expected: str) -> tuple:
    """The values as `kind`; TypeError where that changes one or there is no sequence."""
    try:
        items = tuple(values)
        found = tuple(map(kind, items))
    except (TypeError, ValueError):
        items, found = None, ()
    if found != items:
        expect(False, op, argument, expected, repr(values), TypeError)
    return found


def _is_layer(x, weight, bias, lora_a, lora_b) -> bool:
    """Whether all of `check_layer` holds, found out without making a single message."""
    for tensor in (x, weight, lora_a, lora_b) if bias is None else (x, weight, bias, lora_a, lora_b):
        if not (isinstance(tensor, Tensor) and tensor.dtype in FLOATS and tensor.device == x.device):
            return False
    if x.dim() < 1 or weight.dim() != 2 or lora_a.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    width = x.shape[-1]
    return weight.shape[1] == width == lora_a.shape[1] and lora_b.shape == (weight.shape[0], lora_a.shape[0])


def check_layer(op: str, x, weight, bias, lora_a, lora_b, at: str = "") -> None:
    """Types, dtypes, devices and shapes of the linear layer and its stacked adapters; `at`: its place in a list."""
    if _is_layer(x, weight, bias, lora_a, lora_b):
        return
    for name, value, optional in (
        ("x", x, False),
        (f"weight{at}", weight, False),
        (f"bias{at}", bias, True),
        (f"lora_a{at}", lora_a, False),
        (f"lora_b{at}", lora_b, False),
    ):
        expect_tensor(op, name, value, optional)
        if value is not None:
            expect_floating(op, name, value)
            expect_device(op, name, value, x.device)
    expect(x.dim() >= 1, op, "x", "of shape [..., d_in]", list(x.shape))
    expect(weight.dim() == 2, op, f"weight{at}", "of shape [d_out, d_in]", list(weight.shape))
    expect(lora_a.dim() == 2, op, f"lora_a{at}", "of shape [R, d_in]", list(lora_a.shape))
    width, shape = x.shape[-1], list(weight.shape)
    expect(weight.shape[1] == width, op, f"weight{at}", f"[d_out, d_in] with d_in = {width} as in x", shape)
    expect_shape(op, f"lora_a{at}", lora_a, "[R, d_in]", (lora_a.shape[0], width))
    expect_shape(op, f"lora_b{at}", lora_b, "[d_out, R]", (weight.shape[0], lora_a.shape[0]))
    if bias is not None:
        expect_shape(op, f"bias{at}", bias, "[d_out]", (weight.shape[0],))


def check_dropout(op: str, dropout: float) -> float:
    return expect_real(op, "dropout", dropout, "a probability in [0, 1)", lambda p: 0.0 <= p < 1.0)


#: what the checks of a call came to, by all that they look at
_CHECKED: dict[tuple, tuple[list[int], list[float], list[bool], float]] = {}
MOST_CHECKED = 4096
#: a tuple of these never changes
CONSTANTS = frozenset({int, float, bool})


def _frozen(value: object) -> object:
    return tuple(value) if type(value) is list else value


def _is_constant(value: object) -> bool:
    values = value if type(value) is tuple else (value,)
    return value is None or CONSTANTS.issuperset(map(type, values))


def check_call(
    op: str, x, weight, bias, lora_a, lora_b, experts: int | None, ranks, scaling, trainable, dropout, at: str = ""
) -> tuple[list[int], list[float], list[bool], float]:  # fmt: skip
    """Check layer and options; ranks, scalings and whether each trains, for every expert, and the dropout.

    A model makes the same few kinds of calls again and again: what one came to is looked up for the next.
    """

    def check():
        check_layer(op, x, weight, bias, lora_a, lora_b, at)
        resolved = resolve_experts(op, ranks, scaling, trainable, lora_a.shape[0], experts)
        return *resolved, check_dropout(op, dropout)

    if torch.compiler.is_compiling():
        return check()
    options = (experts, _frozen(ranks), _frozen(scaling), _frozen(trainable), dropout, type(dropout))
    try:
        key = (
            op, x.dtype, x.device, x.shape[-1],
            weight.dtype, weight.device, weight.shape,
            lora_a.dtype, lora_a.device, lora_a.shape,
            lora_b.dtype, lora_b.device, lora_b.shape,
            None if bias is None else (bias.dtype, bias.device, bias.shape),
            *options,
        )  # fmt: skip
        found = _CHECKED.get(key)
    except (AttributeError, IndexError, TypeError):
        # the checks say what is wrong
        return check()
    if found is None:
        found = check()
        if all(map(_is_constant, options[:-1])):
            if len(_CHECKED) >= MOST_CHECKED:
                _CHECKED.clear()
            _CHECKED[key] = found
    return found


def check_gates(op: str, name: str, gates: Tensor | None, x: Tensor, ranks) -> tuple[Tensor | None, int | None]:
    """The gates, one for all experts expanded, and the number of experts that they tell."""
    expect_tensor(op, name, gates, optional=True)
    if gates is None:
        return None, None
    is_number = gates.dtype != torch.bool and not gates.is_complex()
    expect(is_number, op, name, "floating or integer", gates.dtype, TypeError)
    expect_device(op, name, gates, x.device)
    if not gates.is_floating_point():
        expect(ranks is not None, op, "ranks", "given with integer gates", None)
        return gates, None
    if ranks is not None and (gates.dim() == 0 or gates.shape[-1] == 1) and hasattr(ranks, "__len__"):
        gates = gates.expand(*gates.shape[:-1], len(ranks))
    return gates, gates.shape[-1] if gates.dim() else None


def flatten_gates(
    op: str, gates: Tensor | None, lead: torch.Size, ranks: Sequence[int], name: str = "gates"
) -> Tensor | None:
    """Gates as [G, E] or ids as [G], where the T tokens are G runs of equal length that share a row."""
    if gates is None:
        return None
    experts = len(ranks)
    floating = gates.is_floating_point()
    if not floating and gates.dtype not in (torch.int32, torch.int64):
        gates = gates.to(torch.int64)
    if gates.shape == ((*lead, experts) if floating else lead):
        return gates if len(lead) == 1 else gates.reshape(-1, experts) if floating else gates.reshape(-1)
    if floating:
        expect(
            gates.dim() >= 1 and gates.shape[-1] == experts,
            op,
            name,
            f"broadcastable to [..., E] with E = {experts}",
            list(gates.shape),
        )
        outer, tail = gates.shape[:-1], (experts,)
    else:
        outer, tail = gates.shape, ()
    fits = len(outer) <= len(lead) and all(
        have in (1, want) for have, want in zip(outer[::-1], lead[::-1], strict=False)
    )
    expect(fits, op, name, f"broadcastable to {[*lead, *(['E'] if floating else [])]}", list(gates.shape))
    outer = (1,) * (len(lead) - len(outer)) + tuple(outer)
    split = len(lead)
    # without tokens there are no runs to share a row
    while split > 0 and outer[split - 1] == 1 and 0 not in lead:
        split -= 1
    # runs of equal gates are the trailing dims of size 1; a broadcast dim before them has to be expanded
    full = gates.reshape(*outer, *tail).expand(*lead[:split], *outer[split:], *tail)
    return full.reshape(-1, *tail)


def in_one_dtype(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """x as `[T, d_in]` and the other tensors in its dtype, or in that of an active autocast."""
    device, dtype = x.device.type, x.dtype
    # autocast leaves float64 alone, and knows no meta device
    if device != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return [tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in (flat, *tensors)]


def lora_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    scaling: float | Sequence[float] = 1.0,
    trainable: Sequence[bool] | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """A linear layer plus its LoRA experts, mixed in rank space.

        y = x W^T + b + ((drop(x) A^T) * G) B^T,    G[t, j] = gate[t, expert of j] * scaling[expert of j]

    Args:
        x: `[..., d_in]`, float32, bfloat16, float16 or float64.
        weight, bias: the base layer, `[d_out, d_in]` and `[d_out]` or None.
        lora_a, lora_b: the experts stacked along the rank, `[R, d_in]` and `[d_out, R]`; cast to x's dtype. The
            gradient of lora_b lies in memory as lora_b does, by rows or by columns, without gaps. weight and lora_b may
            lie `side_by_side` and x in `rows_with_room`, where the Triton provider can take one product for both.
        gates: None, every expert weighs 1; floating, broadcastable to `[..., E]`; integer, broadcastable to `[...]`,
            the expert of each token or sample, -1 for the base layer alone.
        ranks: E integers that sum to R; None means R / E each, with E the gates' last dimension (1 without gates).
            Integer gates need it. It is a constant of compiled graphs, gates are not.
        scaling: a float, or one for each expert (alpha / rank in LoRA's terms).
        trainable: E booleans. A frozen expert adds to y and to the gradient of x, and gets none itself.
        dropout: probability of dropping an entry of x on the LoRA path, one mask for all experts.
        backend: "reference", "cpp", "triton", "cuda", or None to choose by device, dtype and size.

    Returns:
        y `[..., d_out]` in x's dtype. Differentiable in x, weight, bias, lora_a, lora_b and floating gates.

    Raises:
        TypeError, ValueError: a wrong type, dtype, device or shape, gates that do not broadcast, ranks that do not sum
            to R, and, for ids on the CPU, an id outside -1..E-1 with its position. On a GPU such an id selects no
            expert, and a later call or optimizer step raises it as an error, see `faults`.

    Under autocast x, weight, bias, lora_a and lora_b go to the autocast dtype and gates stay as they are. Products
    accumulate in float32 or better.

    Source: Hu et al., LoRA (2021); the rank-space form of a mixture of LoRA experts.

    >>> x, w = torch.randn(2, 3, 8), torch.randn(5, 8)
    >>> a, b = torch.randn(4, 8), torch.randn(5, 4)
    >>> lora_mix(x, w, None, a, b, torch.tensor([[0], [1]]), ranks=(2, 2)).shape
    torch.Size([2, 3, 5])
    """
    op = "lora_mix"
    expect_tensor(op, "x", x)
    gates, experts = check_gates(op, "gates", gates, x, ranks)
    ranks, scaling, trainable, dropout = check_call(
        op, x, weight, bias, lora_a, lora_b, experts, ranks, scaling, trainable, dropout
    )
    flat = flatten_gates(op, gates, x.shape[:-1], ranks)
    if flat is not None and flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    seed = draw_seed(x.device) if dropout > 0.0 else None
    y, _ = lora_mix_op(
        *in_one_dtype(x, weight, bias, lora_a, lora_b),
        flat,
        seed,
        ranks,
        scaling,
        trainable,
        dropout,
        backend=backend,
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
