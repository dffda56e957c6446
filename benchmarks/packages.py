"""Peers from packages that may or may not be there: what they do is theirs, what is here is the call and the layout."""

# T tokens, K in, N out, E experts, r rank of one expert, k chosen experts, B samples, V vocabulary

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "add_optional",
    "bitsandbytes_adamw",
    "grouped_mm",
    "liger_cross_entropy",
    "moe_ops_mix",
    "moe_ops_router",
    "optimi_adamw",
    "peft_linears",
    "polylora_forward",
    "torch_grouped_mix",
]

#: packages whose kernels run on CUDA devices alone
NEEDS_CUDA = ("moe_ops", "polylora", "optimi", "bitsandbytes", "liger_kernel")
#: how far a peer's result may lie from what it should be, in norm; half precision rounds at every product
MOST_OFF = 0.03


def add_optional(
    field: dict, refused: dict[str, str], name: str, module: str, device: torch.device, make: Callable, like=None
) -> None:
    """Put `make()` into `field` under `name` and run it once, or say why it stays out.

    like: `() -> tensor`, what it has to give, up to rounding. What needs a CUDA device is not spoken of where there is
    none.
    """
    if module in NEEDS_CUDA and device.type != "cuda":
        return
    try:
        importlib.import_module(module)
        run = make()
        found = run()
        if like is not None:
            wanted = like().detach().double()
            off = float((found.detach().double().view(wanted.shape) - wanted).norm() / wanted.norm())
            assert off < MOST_OFF, f"off by {off:.1e} of the norm"
    except ImportError as error:
        refused[name] = f"the package {module} does not import: {error}"
    except Exception as error:  # a peer that fails is told and left out
        refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        field[name] = run


def peft_linears(weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scaling: float) -> dict[str, tuple]:
    """PEFT's LoRA layer for one adapter with these very weights and its trainable tensors, by name.

    As installed it keeps adapters of half precision in float32; the other one keeps them in the layer's dtype.
    """
    from peft import LoraConfig, get_peft_model

    rank = a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["layer"])
    found = {}
    for name, casts in (("PEFT", True), ("PEFT, adapters not cast", False)):
        if not casts and weight.dtype == torch.float32:
            continue
        holder = nn.Module()
        holder.layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            holder.layer.weight.copy_(weight)
            holder.layer.bias.copy_(bias)
        layer = get_peft_model(holder, config, autocast_adapter_dtype=casts).base_model.model.layer
        adapters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with torch.no_grad():
            adapters[0].copy_(a)
            adapters[1].copy_(b)
        found[name] = (layer, adapters)
    return found


# -- grouped products -------------------------------------------------------------------------------------------------


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped product under the name that this torch has for it."""
    run = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return run(x, weights, offs=ends)


def torch_grouped_mix(x, weight, bias, a_eKr, b_erN, values, indices, scaling: float):
    """Top-k experts on torch's grouped products: rows sorted by expert, each product once, k rows summed in order.

    a_eKr [E, K, r] and b_erN [E, r, N] lie as the product wants them; values and indices [T, k].
    """
    tokens, top_k = indices.shape
    experts = indices.reshape(-1)
    order = experts.argsort(stable=True)
    counts = (experts[:, None] == torch.arange(a_eKr.shape[0], device=x.device)).sum(0)
    ends = counts.cumsum(0).to(torch.int32)
    narrow = grouped_mm(x[order // top_k], a_eKr, ends)
    narrow = narrow * (values.reshape(-1)[order] * scaling).to(x.dtype)[:, None]
    wide = grouped_mm(narrow, b_erN, ends)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    return F.linear(x, weight, bias) + wide[places].view(tokens, top_k, -1).sum(1)


def moe_ops_mix(x, weight, bias, a_erK, b_eNr, values, indices, scaling: float):
    """Top-k experts on moe-ops: permute by counting sort, two grouped products, unpermute with the gates."""
    from moe_ops import grouped_gemm, permute, unpermute

    tokens, top_k = indices.shape
    rows, places, offsets = permute(x, indices.to(torch.int32), E=a_erK.shape[0])
    wide = grouped_gemm(grouped_gemm(rows, a_erK, offsets), b_eNr, offsets)
    return F.linear(x, weight, bias) + unpermute(wide, places, values * scaling, tokens, top_k)


def moe_ops_router(x, weight, top_k: int):
    """moe-ops' top-k and softmax in one kernel; load-balance and z loss, which it has not, in plain torch."""
    from moe_ops import fused_topk_softmax

    logits = F.linear(x, weight).float()
    values, indices = fused_topk_softmax(logits, top_k)
    indices = indices.long()
    gates = torch.zeros_like(logits).scatter(-1, indices, values)
    load = torch.zeros_like(logits).scatter(-1, indices, 1.0).sum(0)
    balance = logits.shape[-1] * ((load / load.sum()).detach() * torch.softmax(logits, -1).mean(0)).sum()
    return gates, balance + torch.logsumexp(logits, -1).square().mean()


def polylora_forward(x_BSK, weight, bias, a_eKr, b_erN, ids_B, scaling: float) -> Callable[[], Tensor]:
    """polylora's two kernels for one adapter a sample, forward; the second adds onto the base layer's result."""
    from polylora.sgmv import sgmv_lora_a_fwd, sgmv_lora_b_fwd

    samples, length, _ = x_BSK.shape
    device, ids = x_BSK.device, ids_B.to(torch.int32)
    lengths = torch.full((samples,), length, dtype=torch.int32, device=device)
    ranks = torch.full((a_eKr.shape[0],), a_eKr.shape[2], dtype=torch.int32, device=device)
    scales = torch.full((a_eKr.shape[0],), scaling, dtype=torch.float32, device=device)

    def run() -> Tensor:
        y = F.linear(x_BSK, weight, bias)
        narrow = sgmv_lora_a_fwd(x_BSK, a_eKr, lengths, ids, ranks)
        return sgmv_lora_b_fwd(narrow, b_erN, lengths, ids, ranks, scales, base_output=y)

    return run


# -- optimizers and losses --------------------------------------------------------------------------------------------


def optimi_adamw(params: list[Tensor], options: dict) -> Callable[[], object]:
    from optimi import AdamW

    return AdamW(params, lr=options["lr"], weight_decay=options["weight_decay"]).step


def bitsandbytes_adamw(params: list[Tensor], options: dict) -> Callable[[], object]:
    from bitsandbytes.optim import AdamW32bit

    return AdamW32bit(params, lr=options["lr"], weight_decay=options["weight_decay"]).step


def liger_cross_entropy(hidden, head, labels, smoothing: float) -> Tensor:
    """Liger's loss on a linear head, summed over tokens."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(label_smoothing=smoothing, reduction="sum")(head, hidden, labels)
