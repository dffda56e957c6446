"""Frozen vision encoders for composed models.

An encoder is an `nn.Module` with `preprocess(images) -> pixel_values`, `forward(pixel_values) -> [n, P, hidden_size]`
and the attributes `hidden_size` and `image_size`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..options import check_model_name

__all__ = ["HFVision", "load_vision", "weights_identity"]

ENCODER = ("preprocess", "hidden_size", "image_size")


class HFVision(nn.Module):
    """A vision model of transformers: one hidden layer of it, without the class token where there is one.

    Args:
        model: from `AutoModel`, or the vision half of a two-tower model.
        processor: its image processor.
        select_layer: index into `hidden_states`; -2 as in LLaVA.
    """

    def __init__(self, model: nn.Module, processor, select_layer: int = -2):
        super().__init__()
        self.model = model
        self.processor = processor
        self.select_layer = select_layer
        self.hidden_size = model.config.hidden_size
        self.image_size = model.config.image_size
        self.requires_grad_(False)

    def preprocess(self, images: Sequence) -> Tensor:
        return self.processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.model(pixel_values, output_hidden_states=True).hidden_states[self.select_layer]
        # class and register tokens come before the patches
        return hidden[:, -((pixel_values.shape[-1] // self.model.config.patch_size) ** 2) :]


def load_vision(vision: str | nn.Module, select_layer: int = -2, image_size: int | None = None) -> nn.Module:
    """An encoder from an asset name, a name or folder of transformers, or a module that is one already."""
    if isinstance(vision, nn.Module):
        lacks = [name for name in ENCODER if not hasattr(vision, name)]
        if lacks:
            raise TypeError(f"vision: {type(vision).__name__} lacks {', '.join(lacks)}")
        return vision.requires_grad_(False).eval()
    if vision == "efficientnet-lite0":
        from . import efficientnet_lite0

        return efficientnet_lite0.load(**({} if image_size is None else {"image_size": image_size}))
    if image_size is not None:
        raise ValueError(f"image_size: {vision!r} has the size of its own configuration, got {image_size}")
    check_model_name("vision", vision, ("efficientnet-lite0",))
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(vision)
    model = getattr(model, "vision_model", model)
    return HFVision(model, AutoImageProcessor.from_pretrained(vision), select_layer).eval()


def weights_identity(module: nn.Module) -> str:
    """A digest of a module's weights and of the layer it takes."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((type(module).__name__, getattr(module, "select_layer", None))).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
