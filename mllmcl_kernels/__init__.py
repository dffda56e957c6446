"""Kernels for continual learning with LoRA experts: mixing, routing, masked updates, forward and backward."""

from .concat import rows_with_room, side_by_side
from .library import backends
from .masks import Mask
from .ops.anchor_grad import anchor_grad_
from .ops.distillation_loss import distillation_loss, teacher_top_k
from .ops.ema_update import ema_update_
from .ops.importance_update import importance_update_
from .ops.lora_mix import lora_mix
from .ops.lora_mix_routed import lora_mix_routed
from .ops.lora_mix_routed_shared import lora_mix_routed_shared
from .ops.lora_mix_shared import lora_mix_shared
from .ops.mask_grads import mask_grads_
from .ops.masked_adamw import masked_adamw_
from .ops.orthogonality_loss import orthogonality_loss
from .ops.project_grads import project_grads_
from .ops.route import Routing, route
from .ops.sampled_product_l1 import SampledEntries, sampled_product_l1
from .ops.soft_target_cross_entropy import soft_target_cross_entropy
from .optim import MaskedAdamW
from .tuning import tune

__all__ = [
    "Mask",
    "MaskedAdamW",
    "Routing",
    "SampledEntries",
    "anchor_grad_",
    "backends",
    "distillation_loss",
    "ema_update_",
    "importance_update_",
    "lora_mix",
    "lora_mix_routed",
    "lora_mix_routed_shared",
    "lora_mix_shared",
    "mask_grads_",
    "masked_adamw_",
    "orthogonality_loss",
    "project_grads_",
    "route",
    "rows_with_room",
    "sampled_product_l1",
    "side_by_side",
    "soft_target_cross_entropy",
    "teacher_top_k",
    "tune",
]
