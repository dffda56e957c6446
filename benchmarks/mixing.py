"""What the two mixing benchmarks share: tensors of a case, steps with fresh gradients, gradients to check."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mllmcl_kernels import rows_with_room, side_by_side

from .cases import MixCase

__all__ = ["SCALING", "captured", "layer", "step", "useful_flops", "values_and_gradients"]

SCALING = 2.0


def layer(case: MixCase, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """A frozen layer, adapters that train, and the gates or ids of the case, with a direction for the backward.

    `b_columns` is `b` once more, by columns in memory. Where ours can take one product, `weight_beside` and `b_beside`
    are `weight` and `b` side by side, and `x_in_place` is `x` in rows with room.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    total = case.experts * case.rank
    found = {
        "x": normal(case.tokens, case.width).requires_grad_(),
        "weight": normal(case.out, case.width, scale=case.width**-0.5),
        "bias": normal(case.out),
        "a": normal(total, case.width, scale=case.width**-0.5).requires_grad_(),
        "b": normal(case.out, total, scale=0.1).requires_grad_(),
        "gates": None,
        "ids": None,
        "dy": normal(case.tokens, case.out),
        "router": normal(case.experts, case.width, scale=case.width**-0.5).requires_grad_(),
    }
    found["b_columns"] = found["b"].detach().t().contiguous().t().requires_grad_()
    if device.type == "cuda" and dtype != torch.float32 and case.tokens >= 512:
        found["weight_beside"], beside = side_by_side(found["weight"], found["b"])
        found["b_beside"] = beside.requires_grad_()
        placed = rows_with_room((case.tokens, case.width), total, dtype=dtype, device=device)
        found["x_in_place"] = placed.copy_(found["x"].detach()).requires_grad_()
    if case.gates == "token":
        found["gates"] = torch.softmax(normal(case.tokens, case.experts).float(), -1).to(dtype).requires_grad_()
    elif case.gates == "sample":
        found["ids"] = (torch.arange(case.samples) % case.experts).to(device)
    return found


def useful_flops(case: MixCase, trained: bool = True) -> int:
    """Products of the base layer and of the adapters; backward: dX, dA, dB, the frozen weight has no gradient."""
    base = case.tokens * case.width * case.out
    adapters = case.tokens * case.experts * case.rank * (case.width + case.out)
    return 2 * (base + adapters) + (2 * (base + 2 * adapters) if case.backward and trained else 0)


def step(run: Callable[[], Tensor], leaves: Sequence[Tensor], dy: Tensor | None) -> Callable[[], object]:
    """A forward without autograd where there is no dy, else a forward and a backward into fresh gradients."""

    def forward():
        with torch.no_grad():
            return run()

    def both():
        for leaf in leaves:
            leaf.grad = None
        run().backward(dy)

    return forward if dy is None else both


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of `run`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def values_and_gradients(run: Callable[..., Tensor], tensors: dict, dy: Tensor, wide: bool) -> list[Tensor]:
    """y and the gradient of every tensor that asks for one; `wide`: from float64 copies."""
    if wide:
        tensors = {
            key: value.detach().double().requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for key, value in tensors.items()
        }
        dy = dy.double()
    leaves = [value for value in tensors.values() if isinstance(value, Tensor) and value.requires_grad]
    y = run(**tensors)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
