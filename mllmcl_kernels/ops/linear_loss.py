"""What losses on the logits of a linear head share: a chunk of logits at a time, gradients on the way, reductions.

    logits = hidden W^T + b;    total = sum over tokens of weight * loss(logits of the token)

The gradient of a loss with respect to a chunk of logits overwrites the chunk, and its products with W and with hidden
are the gradients asked for. So forward and backward together take two products of [T, D] by [D, V] (three with a head
that trains), as with the logits held, and hold one chunk of them. A call that asked for no gradient makes up for it in
backward, where the same op runs with the gradients of the losses as weights.
"""

# T tokens, D width of hidden, V vocabulary, C tokens of a chunk
# hidden_TD, head_weight_VD, head_bias_V, weights_T, losses_T, logits_CV

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import expect, expect_floating, expect_shape, expect_tensor
from ..library import debug_checks
from ..op import Cost, Op
from ..products import product_nt
from .lora_mix import in_one_dtype

__all__ = [
    "REDUCTIONS",
    "check_head",
    "check_labels",
    "check_options",
    "fake_linear_loss",
    "is_integer",
    "linear_loss",
    "linear_loss_backward",
    "linear_loss_cost",
    "may_look",
    "reduced",
    "setup_context",
    "wide_dtype",
    "wide_logits",
    "write_gradient",
]

REDUCTIONS = ("mean", "sum", "none")
#: a chunk holds about so many bytes of logits, and a whole number of blocks of tokens
CHUNK_BYTES, BLOCK = 64 * 2**20, 128


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and of all arithmetic on logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(tokens: int, head_weight: Tensor, chunk: int | None, needs_weight: bool) -> int:
    """Tokens of a chunk; with a head that trains as much memory as its gradient takes in float32."""
    if chunk is None:
        row = head_weight.shape[0] * head_weight.element_size()
        room = max(CHUNK_BYTES, 4 * head_weight.numel() if needs_weight else 0)
        chunk = max(1, room // (row * BLOCK)) * BLOCK
    return max(1, min(chunk, tokens))


def wide_logits(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> Tensor:
    """All logits in float32 or better, rounded to hidden's dtype by the product: what a head in a model gives."""
    return torch.nn.functional.linear(hidden, head_weight, head_bias).to(wide_dtype(hidden.dtype))


def is_compacted(device: torch.device) -> bool:
    """Whether tokens that do not count are left out of the products: where it takes no wait for the device."""
    return device.type == "cpu"


def may_look(device: torch.device) -> bool:
    """Whether labels and indices are looked at before they are used: where that takes no wait, or it was asked for."""
    return device.type == "cpu" or debug_checks()


def linear_loss(
    rows: Callable[..., Tensor],
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    counted: Tensor | None,
    factor: Tensor,
    given: Sequence[Tensor],
    chunk: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total, losses `[T]`, and the gradients of total with respect to hidden, head_weight, head_bias where needed.

    Args:
        rows: (logits `[C, V]`, factor `[C]`, *given of the chunk, gradient) -> losses `[C]`. With `gradient` it writes
            factor times the gradient of the losses over the logits, else anything.
        counted: bool `[T]`, which tokens count; None for all. The others have loss and gradients zero, whatever their
            hidden holds.
        factor: `[T]` in the wide dtype, weights of the losses in total, never 0 where a token counts; NaN for a token
            without a valid target.
        given: tensors with a row for each token, for `rows`.
    """
    tokens, (vocabulary, width) = hidden.shape[0], head_weight.shape
    wide = factor.dtype
    positions = None
    if counted is not None and is_compacted(hidden.device):
        positions = counted.nonzero()[:, 0]
        positions = None if len(positions) == tokens else positions
    elif counted is not None:
        hidden = hidden.masked_fill(~counted[:, None], 0.0)
        factor = factor.masked_fill(~counted, 0.0)
    count = tokens if positions is None else len(positions)
    step = chunk_rows(count, head_weight, chunk, needs[1])
    losses = hidden.new_zeros(tokens, dtype=wide)
    dhidden = hidden.new_zeros(tokens, width) if needs[0] else hidden.new_empty(0)
    # one chunk rounds its product once; more of them are summed in the wide dtype
    dtype = hidden.dtype if count <= step else wide
    dweight = hidden.new_zeros(vocabulary, width, dtype=dtype) if needs[1] else hidden.new_empty(0)
    dbias = hidden.new_zeros(vocabulary, dtype=wide) if needs[2] else hidden.new_empty(0)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        at = slice(begin, end) if positions is None else positions[begin:end]
        part = hidden[at]
        logits = product_nt(part, head_weight, head_bias)
        losses[at] = rows(logits, factor[at], *(tensor[at] for tensor in given), gradient=any(needs))
        if needs[0]:
            dhidden[at] = product_nt(logits, head_weight.t())
        if needs[1] and dtype == hidden.dtype:
            torch.addmm(dweight, logits.t(), part, out=dweight)
        elif needs[1]:
            dweight.add_(torch.mm(logits.t(), part))
        if needs[2]:
            dbias.add_(logits.sum(0, dtype=wide))
        # the next chunk's take the same memory
        del logits
    if counted is not None:
        losses.masked_fill_(~counted, 0.0)
    losses.masked_fill_(factor.isnan(), float("nan"))
    return (losses * factor).sum(), losses, dhidden, dweight.to(hidden.dtype), dbias.to(hidden.dtype)


def write_gradient(z: Tensor, logits: Tensor, factor: Tensor) -> None:
    """The gradient z of a chunk over its logits, which may be the same memory; exactly zero where the factor is."""
    if not is_compacted(z.device):
        z.masked_fill_((factor == 0)[:, None], 0.0)
    if z is not logits:
        logits.copy_(z)


# -- what the declarations of such ops share --------------------------------------------------------------------------


def fake_linear_loss(hidden, head_weight, needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, (vocabulary, width) = hidden.shape[0], head_weight.shape
    wide = wide_dtype(hidden.dtype)
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    grads = (hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))
    return hidden.new_empty((), dtype=wide), hidden.new_empty(tokens, dtype=wide), *grads


def linear_loss_cost(hidden, head_weight, needs, *tables: Tensor | None) -> Cost:
    """Products of logits and gradients; hidden, head, tables of targets read once, gradients written once."""
    size = hidden.element_size()
    grads = (hidden.numel(), head_weight.numel(), head_weight.shape[0])
    written = sum(count for count, need in zip(grads, needs, strict=True) if need)
    read = sum(table.numel() * table.element_size() for table in tables if table is not None)
    products = 1 + bool(needs[0]) + bool(needs[1])
    return Cost(
        flops=2 * products * hidden.numel() * head_weight.shape[0],
        bytes=size * (hidden.numel() + head_weight.numel() + written) + read,
    )


def setup_context(ctx, inputs, output) -> None:
    """Keep the gradients that are there already; without any, the arguments, to compute them in backward."""
    ctx.set_materialize_grads(False)
    ctx.needs = inputs[-1]
    if any(ctx.needs):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[2:])
    else:
        ctx.mark_non_differentiable(*output[2:])
        ctx.inputs = [None if isinstance(arg, Tensor) else arg for arg in inputs]
        ctx.save_for_backward(*(arg if isinstance(arg, Tensor) else None for arg in inputs))


def linear_loss_backward(op: Op, ctx, d_total: Tensor | None, d_losses: Tensor | None) -> tuple[Tensor | None, ...]:
    """The autograd formula of `op`, whose arguments are hidden, head_weight, head_bias, weights, ..., needs."""
    if torch.is_grad_enabled():
        # a gradient computed in the forward is a constant here
        raise RuntimeError(f"{op.name}: gradients of gradients are not supported")
    wants = list(ctx.needs_input_grad[:3])
    rest = [None] * (len(ctx.needs_input_grad) - 3)
    if any(ctx.needs):
        for name, want, need in zip(op.argument_names, wants, ctx.needs, strict=False):
            if want and not need:
                raise RuntimeError(f"{op.name}: the forward was not asked for the gradient of {name}")
        grads = [None if d_total is None else grad * d_total for grad in ctx.saved_tensors]
    else:
        inputs = [arg if tensor is None else tensor for arg, tensor in zip(ctx.inputs, ctx.saved_tensors, strict=True)]
        inputs[3], inputs[-1] = _token_gradient(inputs[0], inputs[3], d_total, d_losses), wants
        grads = op(*inputs, backend=ctx.backend)[2:]
    return (*(grad if want else None for grad, want in zip(grads, wants, strict=True)), *rest)


def _token_gradient(hidden: Tensor, weights: Tensor | None, d_total: Tensor | None, d_losses: Tensor | None) -> Tensor:
    """Gradient of every token's loss `[T]`."""
    grad = hidden.new_zeros(hidden.shape[0], dtype=wide_dtype(hidden.dtype))
    if d_losses is not None:
        grad = grad + d_losses
    if d_total is not None:
        grad = grad + (d_total if weights is None else d_total * weights)
    return grad


# -- what the public functions share ----------------------------------------------------------------------------------


def check_head(op: str, hidden, head_weight, head_bias) -> None:
    """Types, dtypes, devices and shapes of hidden states and the head they go through."""
    for name, value in (("hidden", hidden), ("head_weight", head_weight), ("head_bias", head_bias)):
        expect_tensor(op, name, value, optional=name == "head_bias")
        if value is not None:
            expect_floating(op, name, value)
            expect(value.device == hidden.device, op, name, f"on {hidden.device} like hidden", value.device)
    expect(hidden.dim() >= 1, op, "hidden", "of shape [..., d]", list(hidden.shape))
    width = hidden.shape[-1]
    fits = head_weight.dim() == 2 and head_weight.shape[1] == width
    expect(fits, op, "head_weight", f"[V, d] with d = {width} as in hidden", list(head_weight.shape))
    expect(head_weight.shape[0] >= 2, op, "head_weight", "of at least two rows", list(head_weight.shape))
    if head_bias is not None:
        expect_shape(op, "head_bias", head_bias, "[V]", (head_weight.shape[0],))


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_labels(op: str, hidden: Tensor, labels) -> Tensor:
    """The labels as int64 `[T]`."""
    expect_tensor(op, "labels", labels)
    expect(is_integer(labels), op, "labels", "of an integer dtype", labels.dtype, TypeError)
    expect(labels.device == hidden.device, op, "labels", f"on {hidden.device} like hidden", labels.device)
    expect_shape(op, "labels", labels, "[...] of hidden [..., d]", hidden.shape[:-1])
    return labels.reshape(-1).to(torch.int64)


def check_options(op: str, ignore_index, reduction, chunk) -> None:
    expect(isinstance(ignore_index, int), op, "ignore_index", "an integer", ignore_index, TypeError)
    expect(reduction in REDUCTIONS, op, "reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))
    whole = chunk is None or (isinstance(chunk, int) and chunk >= 1)
    expect(whole, op, "chunk", "a number of tokens >= 1 or None", chunk)


def reduced(
    op: Op,
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    arguments: Sequence,
    counted: Tensor | None,
    reduction: str,
    backend: str | None,
) -> Tensor:
    """Run `op` and reduce its losses; sums ask for the gradients in the forward, single losses in the backward."""
    tensors = in_one_dtype(hidden, head_weight, head_bias)
    now = reduction != "none" and torch.is_grad_enabled()
    needs = [now and tensor is not None and tensor.requires_grad for tensor in tensors]
    total, losses, *_ = op(*tensors, *arguments, needs, backend=backend)
    if reduction == "none":
        return losses.view(hidden.shape[:-1])
    if reduction == "sum":
        return total
    return total / (max(losses.shape[0], 1) if counted is None else counted.sum().clamp_min(1))
