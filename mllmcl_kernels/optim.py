"""`MaskedAdamW`: AdamW with masks that really freeze, as a `torch.optim.Optimizer`."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from .checks import FLOATS, as_number, expect, expect_betas, expect_real, expect_scalar, expect_tensor
from .faults import poll_faults
from .layouts import laid_masks, lie_alike
from .masks import Mask, flatten_masks
from .op import Prepared
from .ops.masked_adamw import masked_adamw_op

__all__ = ["MaskedAdamW"]

GRAD = operator.attrgetter("grad")
STEP, EXP_AVG, EXP_AVG_SQ = map(operator.itemgetter, ("step", "exp_avg", "exp_avg_sq"))


def _same(these: Collection, those: Collection) -> bool:
    """Whether both hold the very same objects."""
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _lay_alike(param: Tensor, state: dict) -> None:
    """Let the moments lie in memory as their parameter does: from a file they come by rows."""
    if not lie_alike([param], [state["exp_avg"]], [state["exp_avg_sq"]]):
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.empty_like(param, dtype=state[name].dtype).copy_(state[name])


def _check_group(group: dict) -> None:
    """The options of a parameter group, as they are or as they come from a file."""
    op = "MaskedAdamW"
    expect_scalar(op, "lr", group["lr"], ">= 0", 0)
    expect_betas(op, group["betas"])
    expect_real(op, "eps", group["eps"], ">= 0", lambda value: value >= 0.0)
    expect_real(op, "weight_decay", group["weight_decay"], ">= 0", lambda value: value >= 0.0)
    for name in ("amsgrad", "maximize"):
        expect(not group.get(name), op, name, "False or absent, since there is no such update here", group.get(name))


@dataclass
class _Cohort:
    """Parameters of a group that stand at one step, their state, and their masks as the op takes them.

    places: where in the group's parameters with a gradient they are. step: one tensor, in the state of all of them.
    prepared: the update as it is made from the third time on.
    """

    params: list[Tensor]
    places: list[int]
    states: list[dict]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    step: Tensor
    count: float
    masks: tuple[list, list, list]
    updates: int = 0
    prepared: Prepared | None = None

    def stands(self) -> bool:
        """Whether its states stand where they are thought to stand."""
        return (
            all(map(operator.is_, map(STEP, self.states), repeat(self.step)))
            and all(map(operator.is_, map(EXP_AVG, self.states), self.exp_avgs))
            and all(map(operator.is_, map(EXP_AVG_SQ, self.states), self.exp_avg_sqs))
            and float(self.step) == self.count
        )

    def update(self, grads: list[Tensor], lr: float | Tensor, scale: float | Tensor, *options: float) -> None:
        """One step. Torch sees to it that gradients fit their parameters, so that nothing is checked again."""
        self.step.add_(1.0)
        self.count += 1.0
        if self.prepared is not None:
            if self.prepared([grads], self.count, lr, scale, *options):
                return
            # a parameter may have been laid in memory in another way
            for param, state in zip(self.params, self.states, strict=True):
                _lay_alike(param, state)
            self.exp_avgs, self.exp_avg_sqs = list(map(EXP_AVG, self.states)), list(map(EXP_AVG_SQ, self.states))
        lists = (self.params, grads, self.exp_avgs, self.exp_avg_sqs)
        args = (*lists, *self.masks, *map(as_number, (self.count, lr, scale)), *options)
        masked_adamw_op(*args)
        self.updates += 1
        # looked for once; and anew where what was prepared no longer fits, unless somebody only watches operators
        if self.updates == 2 or self.prepared is not None:
            self.prepared = masked_adamw_op.prepare(*args) or self.prepared


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW whose masked-out entries keep parameter and moments bit for bit.

    State and its layout are those of `torch.optim.AdamW` (`step`, `exp_avg`, `exp_avg_sq` for each parameter;
    parameters that stand at one step share the tensor that counts it); masks are configuration, not state. `max_norm`
    clips by the global norm of the gradients that the masks let through, without a host wait.

    Args:
        params: parameters or parameter groups.
        lr, betas, eps, weight_decay: as in AdamW; lr may be a tensor.
        max_norm: clip the global norm of the masked gradients to this, None for no clipping.
        error_if_nonfinite: raise FloatingPointError before anything moves where the norm of the gradients is no number;
            on the CPU alone, elsewhere the host would have to wait.
        state_dtype: dtype of the moments, None for the parameter's.

    >>> layer = torch.nn.Linear(4, 4)
    >>> optimizer = MaskedAdamW(layer.parameters(), lr=1e-3)
    >>> optimizer.set_mask(layer.weight, Mask.rows(torch.tensor([True, False, False, False])))
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_norm: float | None = None,
        error_if_nonfinite: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        op = "MaskedAdamW"
        _check_group({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if state_dtype is not None:
            expect(state_dtype in FLOATS, op, "state_dtype", "a floating dtype or None", state_dtype, TypeError)
        if max_norm is not None:
            expect_real(op, "max_norm", max_norm, "positive or None", lambda value: value > 0.0)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_norm = max_norm
        self.error_if_nonfinite = error_if_nonfinite
        self.state_dtype = state_dtype
        self._masks: dict[Tensor, Mask] = {}
        self._forget()
        #: global norm of the masked gradients at the last step, a 0-dim tensor on the device, float32 or better
        self.grad_norm: Tensor | None = None

    def set_mask(self, param: Tensor, mask: Mask | None) -> None:
        """Let only the entries that `mask` allows change from the next step on; None lifts the mask."""
        expect_tensor("MaskedAdamW.set_mask", "param", param)
        known = any(param is member for group in self.param_groups for member in group["params"])
        expect(known, "MaskedAdamW.set_mask", "param", "a parameter of this optimizer", tuple(param.shape))
        if mask is not None and not isinstance(mask, Mask):
            expect(False, "MaskedAdamW.set_mask", "mask", "a Mask or None", type(mask).__name__, TypeError)
        self._known.clear()
        if mask is None:
            self._masks.pop(param, None)
            return
        mask = mask.to(param.device)
        mask.check("MaskedAdamW.set_mask", "mask", param)
        self._masks[param] = mask

    def __getstate__(self) -> dict:
        """What copies and pickles hold beside torch's share."""
        own = ("max_norm", "error_if_nonfinite", "state_dtype", "_masks", "grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Nothing is known of the last step."""
        #: by number of the group: its parameters with a gradient at the last step, and their cohorts
        self._known: dict[int, tuple[list[Tensor], list[_Cohort]]] = {}
        #: keys and values of the state at the last step
        self._states: tuple[list, list] = ([], [])

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; what the group asks for and its parameters are looked at first."""
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point():
                expect(False, "MaskedAdamW", "params", "floating", param.dtype, TypeError)

    def state_dict(self) -> dict:
        """As torch's, each parameter with a `step` of its own: torch.optim.AdamW counts every one of them."""
        found = super().state_dict()
        state = {
            key: {**held, "step": held["step"].clone()} if isinstance(held, dict) and "step" in held else held
            for key, held in found["state"].items()
        }
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, with the moments in `state_dtype` instead of the parameter's dtype.

        Raises:
            ValueError: the state is of an AdamW that maximizes or keeps maxima (amsgrad).
        """
        for group in state_dict["param_groups"]:
            _check_group(group)
        super().load_state_dict(state_dict)
        if self.state_dtype is None:
            return
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for place, param in zip(places, params, strict=True):
            held = state_dict["state"].get(place, {})
            for name in {"exp_avg", "exp_avg_sq"} & held.keys():
                self.state[param][name] = held[name].to(param.device, self.state_dtype)

    def _moments(self, param: Tensor) -> dict:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            dtype = self.state_dtype or param.dtype
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        else:
            _lay_alike(param, state)
        return state

    def _scale(self) -> float | Tensor:
        """The factor that brings the norm of the masked gradients down to max_norm."""
        if self.max_norm is None and not self.error_if_nonfinite:
            return 1.0
        alike: dict[tuple, list[Tensor]] = {}
        for param in (param for group in self.param_groups for param in group["params"]):
            if (grad := param.grad) is not None:
                mask = self._masks.get(param)
                grad = grad if mask is None else torch.where(mask.expand(param.shape), grad, 0.0)
                alike.setdefault((grad.device, torch.promote_types(grad.dtype, torch.float32)), []).append(grad)
        if not alike:
            return 1.0
        norms = [norm for (_, dtype), grads in alike.items() for norm in torch._foreach_norm(grads, dtype=dtype)]
        self.grad_norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.error_if_nonfinite and self.grad_norm.device.type == "cpu" and not bool(self.grad_norm.isfinite()):
            raise FloatingPointError(
                f"MaskedAdamW: the norm of the gradients is {float(self.grad_norm)}; nothing moved"
            )
        return 1.0 if self.max_norm is None else (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def _only_initialises(self) -> bool:
        """Whether this is `get_optimizer_state_dict`'s hidden first step (lr 0, zero gradients): state, but no step.

        Counting it would shift every later bias correction. Looked at only while no state exists and lr is 0.
        """
        if self.state or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if any(bool(param.grad.any()) for param in params):
            return False
        for param in params:
            self._moments(param)
        return True

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all groups; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._only_initialises():
            return loss
        if torch.cuda.is_initialized() and not torch.compiler.is_compiling():
            poll_faults(torch.device("cuda", torch.cuda.current_device()))
        scale = self._scale()
        # what is known counts while the states are the very ones that it was learnt from
        if not (_same(self.state.keys(), self._states[0]) and _same(self.state.values(), self._states[1])):
            self._known.clear()
        for number, group in enumerate(self.param_groups):
            params, grads = group["params"], list(map(GRAD, group["params"]))
            if any(map(operator.is_, grads, repeat(None))):
                params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
                grads = [grad for grad in grads if grad is not None]
            lr = expect_scalar("MaskedAdamW", "lr", group["lr"], ">= 0", 0)
            options = (*group["betas"], group["eps"], group["weight_decay"])
            for cohort in self._cohorts(number, params):
                cohort.update([grads[place] for place in cohort.places], lr, scale, *options)
        return loss

    def _cohorts(self, number: int, params: list[Tensor]) -> list[_Cohort]:
        """The parameters that have a gradient, by the step they stand at: those that joined later are behind."""
        before, cohorts = self._known.get(number, ([], []))
        if not _same(before, params) or not all(cohort.stands() for cohort in cohorts):
            by_step: dict[float, list[int]] = {}
            for place, param in enumerate(params):
                by_step.setdefault(float(self._moments(param)["step"]), []).append(place)
            cohorts = [self._cohort(params, places, count) for count, places in by_step.items()]
            self._known[number] = list(params), cohorts
            self._states = list(self.state.keys()), list(self.state.values())
        return cohorts

    def _cohort(self, params: list[Tensor], places: list[int], count: float) -> _Cohort:
        members = [params[place] for place in places]
        states, step = [self.state[param] for param in members], torch.tensor(count, dtype=torch.float32)
        for state in states:
            state["step"] = step  # one for all: hundreds of additions to single numbers take a millisecond
        masks, kinds, actives = flatten_masks("MaskedAdamW", members, [self._masks.get(param) for param in members])
        masks = laid_masks(members, masks, kinds), kinds, actives
        moments = list(map(EXP_AVG, states)), list(map(EXP_AVG_SQ, states))
        return _Cohort(members, places, states, *moments, step, count, masks)
