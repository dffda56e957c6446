"""`lora_mix_shared`: linears that share their input, with LoRA experts each, in one pass over x for all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import expect, expect_tensor
from ...dropout import draw_seed
from ...op import Cost, Op
from ..lora_mix import _cost as mix_cost
from ..lora_mix import check_call, check_gates, check_ids, flatten_gates, in_one_dtype
from .reference import lora_mix_shared_backward_reference, lora_mix_shared_reference
from .samples import backward_samples, bad_samples, samples

__all__ = ["lora_mix_shared", "lora_mix_shared_backward_op", "lora_mix_shared_op"]


def _fake(x, weight, bias, lora_a, lora_b, *_rest) -> list[Tensor]:
    s = x.new_empty(x.shape[0], len(weight) * lora_a[0].shape[0])
    return [s, *(x.new_empty(x.shape[0], one.shape[0]) for one in weight)]


def fake_gradients(x: Tensor, needs: Sequence[bool], weight, lora_a, lora_b) -> list[Tensor]:
    """What gradients of all A stacked and of every weight, bias and B look like; empty where not asked for."""
    needs_weight, needs_bias, needs_a, needs_b = needs
    rows = sum(one.shape[0] for one in lora_a)
    kinds = (
        (needs_a, [x.new_empty(rows, x.shape[1])]),
        (needs_weight, [x.new_empty(one.shape) for one in weight]),
        (needs_bias, [x.new_empty(one.shape[0]) for one in weight]),
        # it lies as B does
        (needs_b, [torch.empty_like(one, dtype=x.dtype) for one in lora_b]),
    )
    return [one if need else x.new_empty(0) for need, kind in kinds for one in kind]


def _fake_backward(dy, x, weight, lora_a, lora_b, gates, *rest) -> list[Tensor]:
    needs = rest[-1]
    dx = x.new_empty(x.shape if needs[0] else (0,))
    dgates = gates.new_empty(gates.shape) if needs[5] else x.new_empty(0)
    return [dx, dgates, *fake_gradients(x, needs[1:5], weight, lora_a, lora_b)]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, gates, seed, *options = inputs
    ctx.count, ctx.options = len(weight), options
    ctx.save_for_backward(x, *weight, *lora_a, *lora_b, gates, seed, output[0])
    ctx.mark_non_differentiable(output[0])
    # no zeros for s, which nobody asks about
    ctx.set_materialize_grads(False)


def layer_needs(wanted: list, trainable: Sequence[bool]) -> list[bool]:
    """Whether a gradient of weight, bias, lora_a and lora_b is asked for in any linear; `wanted` says where."""
    if not isinstance(wanted[1], list):
        # without biases there is no list to tell
        wanted[1] = []
    some = any(trainable)
    return [any(wants) and (some or place < 2) for place, wants in enumerate(wanted)]


def layer_gradients(
    grads: Sequence[Tensor], wanted: Sequence[Sequence[bool]], needs: Sequence[bool]
) -> list[list[Tensor | None]]:
    """Lists of the gradients of weight, bias, lora_a and lora_b, as `wanted`, from what the backward op gives."""
    stacked, *rest = grads
    count = len(rest) // 3
    weight, bias, b = (rest[at : at + count] for at in range(0, len(rest), count))
    kinds = (weight, bias, stacked.chunk(count) if needs[2] else rest, b)
    each = zip(needs, wanted, kinds, strict=True)
    return [
        [grad if need and want else None for want, grad in zip(wants, kind, strict=False)] for need, wants, kind in each
    ]


def output_gradients(dy: Sequence[Tensor | None], x: Tensor, weight: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of all y, zeros for one that nobody uses."""
    pairs = zip(dy, weight, strict=True)
    return [x.new_zeros(x.shape[0], one.shape[0]) if grad is None else grad for grad, one in pairs]


def _backward(ctx, grads):
    count = ctx.count
    x, *saved = ctx.saved_tensors
    weight, lora_a, lora_b = (list(saved[at : at + count]) for at in range(0, 3 * count, count))
    gates, seed, s = saved[3 * count :]
    wants_x, *wanted, wants_gates = ctx.needs_input_grad[:6]
    needs = layer_needs(wanted, ctx.options[2])
    dx, dgates, *rest = lora_mix_shared_backward_op(
        output_gradients(grads[1:], x, weight), x, weight, lora_a, lora_b, gates, seed, s, *ctx.options,
        [wants_x, *needs, wants_gates], backend=ctx.backend,
    )  # fmt: skip
    layers = layer_gradients(rest, wanted, needs)
    return (dx if wants_x else None, *layers, dgates if wants_gates else None, *([None] * 5))


def _cost(x, weight, bias, lora_a, lora_b, *_rest) -> Cost:
    costs = [mix_cost(x, one, None, a, b, None) for one, a, b in zip(weight, lora_a, lora_b, strict=True)]
    again = (len(weight) - 1) * x.numel() * x.element_size()
    return Cost(flops=sum(cost.flops for cost in costs), bytes=sum(cost.bytes for cost in costs) - again)


lora_mix_shared_backward_op = Op(
    name="lora_mix_shared_backward",
    reference=lora_mix_shared_backward_reference,
    package=__name__,
    fake=_fake_backward,
    samples=backward_samples,
)

lora_mix_shared_op = Op(
    name="lora_mix_shared",
    reference=lora_mix_shared_reference,
    package=__name__,
    fake=_fake,
    samples=samples,
    bad_samples=bad_samples,
    cost=_cost,
    setup_context=_setup_context,
    backward=_backward,
    aside=(0,),
    autocast=("x", "weight", "bias", "lora_a", "lora_b"),
)


def check_lists(op: str, weight, others: Sequence[tuple[str, object]]) -> None:
    """Sequences as long as that of the weights; what is named a bias may be None."""
    for name, value in (("weight", weight), *others):
        if value is None and name.endswith("bias"):
            continue
        is_sequence = isinstance(value, Sequence)
        expect(is_sequence, op, name, "a sequence of Tensors", type(value).__name__, TypeError)
        expect(len(weight) > 0, op, "weight", "at least one Tensor", 0)
        expect(len(value) == len(weight), op, name, f"{len(weight)} of them, as many as weight", len(value))


def check_linears(op: str, x, weight, bias, lora_a, lora_b, experts: int | None, options: Sequence) -> tuple:
    """Check all linears; their ranks, scalings, whether each expert trains, and the dropout. `options`: those given."""
    check_lists(op, weight, (("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)))
    found = None
    for at, layer in enumerate(zip(weight, bias or [None] * len(weight), lora_a, lora_b, strict=True)):
        if at > 0 and isinstance(layer[2], Tensor) and layer[2].dim() == 2:
            rows, first = layer[2].shape[0], lora_a[0].shape[0]
            expect(rows == first, op, f"lora_a[{at}]", f"of R = {first} rows like lora_a[0]", rows)
        found = check_call(op, x, *layer, experts, *options, at=f"[{at}]")
    return found


def all_biases(weight: Sequence[Tensor], bias: Sequence[Tensor | None] | None) -> list[Tensor]:
    """The biases, zeros for those that are None beside others; an empty list where there is none at all."""
    if bias is None or all(one is None for one in bias):
        return []
    pairs = zip(weight, bias, strict=True)
    return [one.new_zeros(one.shape[0]) if given is None else given for one, given in pairs]


def layers_in_one_dtype(x: Tensor, *kinds: Sequence[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    """x as `[T, d_in]` and lists of tensors in its dtype, or in that of an active autocast."""
    flat, *rest = in_one_dtype(x, *(one for kind in kinds for one in kind))
    given = iter(rest)
    return flat, [[next(given) for _ in kind] for kind in kinds]


def _as_factors(op: str, gates: Tensor, experts: int) -> Tensor:
    """Ids `[G]` as float32 gates `[G, E]`, 1 for the expert that acts; half precision as float32."""
    if gates.is_floating_point():
        return gates.float() if gates.dtype in (torch.float16, torch.bfloat16) else gates
    if not torch.compiler.is_compiling():
        check_ids(op, gates, experts)
    return (gates[:, None] == torch.arange(experts, device=gates.device)).float()


def _side_by_side(op: str, gates, x: Tensor, count: int, ranks: Sequence[int]) -> Tensor | None:
    """Gates of all linears `[G, L * E]`."""
    if gates is None:
        return None
    lead, given = x.shape[:-1], [gates] if isinstance(gates, Tensor) else list(gates)
    names = ["gates"] if isinstance(gates, Tensor) else [f"gates[{at}]" for at in range(count)]
    flat = [flatten_gates(op, one, lead, ranks, name) for one, name in zip(given, names, strict=True)]
    flat = [_as_factors(op, one, len(ranks)) for one in flat]
    if len(flat) == 1:
        return flat[0].repeat(1, count)
    if len({one.shape[0] for one in flat}) > 1:
        tokens = lead.numel()
        flat = [one.repeat_interleave(tokens // max(one.shape[0], 1), 0) for one in flat]
    return torch.cat(flat, 1)


def _experts_of(op: str, gates, x: Tensor, count: int, ranks) -> tuple[object, int | None]:
    """The gates as `check_gates` gives them, and the number of experts that they tell."""
    if gates is None or isinstance(gates, Tensor):
        return check_gates(op, "gates", gates, x, ranks)
    is_list = isinstance(gates, Sequence)
    got = len(gates) if is_list else type(gates).__name__
    expect(is_list and len(gates) == count, op, "gates", f"None, one Tensor or {count} of them", got)
    for at, one in enumerate(gates):
        expect_tensor(op, f"gates[{at}]", one)
    pairs = [check_gates(op, f"gates[{at}]", one, x, ranks) for at, one in enumerate(gates)]
    return [one for one, _ in pairs], next((experts for _, experts in pairs if experts is not None), None)


def lora_mix_shared(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    gates: Tensor | Sequence[Tensor] | None = None,
    *,
    ranks: Sequence[int] | None = None,
    scaling: float | Sequence[float] = 1.0,
    trainable: Sequence[bool] | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> list[Tensor]:
    """`lora_mix` of L linears that share x, such as q, k and v of attention, or gate and up of a gated MLP.

        y_l = x W_l^T + b_l + ((drop(x) A_l^T) * G_l) B_l^T

    All A are one product over x, and so are their gradients; the gradient of x is written once.

    Args:
        x: `[..., d_in]`, float32, bfloat16, float16 or float64.
        weight, bias: L base layers, `[d_out_l, d_in]` and `[d_out_l]` or None each, or None for no bias at all.
        lora_a, lora_b: L stacks of the same ranks, `[R, d_in]` and `[d_out_l, R]`; cast to x's dtype.
        gates: None, one tensor for all linears, or L of them; each as in `lora_mix`. Ids are used as gates of 0 and 1.
        ranks, scaling, trainable: of the E experts, the same in every linear; as in `lora_mix`.
        dropout: probability of dropping an entry of x on the LoRA path, one mask for all linears and experts.
        backend: "reference", "cpp", "triton", or None to choose by device, dtype and size.

    Returns:
        L tensors y_l `[..., d_out_l]` in x's dtype. Differentiable in x, weight, bias, lora_a, lora_b, floating gates.

    Raises:
        TypeError, ValueError: as `lora_mix`, with the place in the list; lists of another length than weight.

    >>> x, weight = torch.randn(2, 3, 8), [torch.randn(5, 8), torch.randn(7, 8)]
    >>> a, b = [torch.randn(4, 8) for _ in range(2)], [torch.randn(5, 4), torch.randn(7, 4)]
    >>> [y.shape for y in lora_mix_shared(x, weight, None, a, b, torch.tensor([0.5, 0.5]))]
    [torch.Size([2, 3, 5]), torch.Size([2, 3, 7])]
    """
    op = "lora_mix_shared"
    expect_tensor(op, "x", x)
    check_lists(op, weight, ())
    count = len(weight)
    gates, experts = _experts_of(op, gates, x, count, ranks)
    ranks, scaling, trainable, dropout = check_linears(
        op, x, weight, bias, lora_a, lora_b, experts, (ranks, scaling, trainable, dropout)
    )
    flat = _side_by_side(op, gates, x, count, ranks)
    rows, layers = layers_in_one_dtype(x, weight, all_biases(weight, bias), lora_a, lora_b)
    seed = draw_seed(x.device) if dropout > 0.0 else None
    _, *found = lora_mix_shared_op(rows, *layers, flat, seed, ranks, scaling, trainable, dropout, backend=backend)
    return [y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]) for y in found]
