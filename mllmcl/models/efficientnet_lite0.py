"""EfficientNet-Lite0, a small frozen vision encoder: images to a grid of feature tokens.

Source: Tan and Le, EfficientNet (2019); the Lite variant has ReLU6 and no squeeze-and-excite. Weights: ImageNet, from
the asset `efficientnet-lite0` (Apache-2.0). Kernel sizes and channels are read from the tensors; batch norms are folded
into the convolutions, so the module has no training mode of its own.
"""

# n images, c channels, h w grid, P tokens of an image

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EfficientNetLite0", "load"]

BATCH_NORM_EPS = 1e-3
STRIDE_TWO = frozenset((1, 3, 5, 11))
NUM_BLOCKS = 16
#: the last block on the grid of stride 16
FINE_BLOCK = 10
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class FoldedConv(nn.Module):
    """A convolution with its batch norm folded in and TensorFlow's SAME padding."""

    def __init__(self, state: dict[str, Tensor], conv: str, norm: str, stride: int = 1, activate: bool = True):
        super().__init__()
        weight = state[f"{conv}.weight"]
        scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + BATCH_NORM_EPS)
        self.weight = nn.Parameter(weight * scale[:, None, None, None], requires_grad=False)
        self.bias = nn.Parameter(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale, requires_grad=False)
        self.stride = stride
        self.activate = activate
        self.groups = weight.shape[0] if weight.shape[1] == 1 else 1

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        height, width = (max((-(-n // self.stride) - 1) * self.stride + kernel - n, 0) for n in x.shape[-2:])
        if height or width:
            # SAME padding is not symmetric: the odd row and column go to the bottom and the right
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        x = F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)
        return F.relu6(x) if self.activate else x


class Block(nn.Module):
    """Expand, depthwise, project; with a skip where the shapes match."""

    def __init__(self, state: dict[str, Tensor], index: int):
        super().__init__()
        name = f"_blocks.{index}"
        stride = 2 if index in STRIDE_TWO else 1
        expands = f"{name}._expand_conv.weight" in state
        self.expand = FoldedConv(state, f"{name}._expand_conv", f"{name}._bn0") if expands else nn.Identity()
        self.depthwise = FoldedConv(state, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        self.project = FoldedConv(state, f"{name}._project_conv", f"{name}._bn2", activate=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Images to tokens: `[n, 3, size, size]` float to `[n, P, 768]`, P = (size / 32)^2.

    A token joins the 320 channels of the last block (stride 32) with the 112 channels of block 10 (stride 16) of its
    four grid cells.

    Args:
        state: the published state dict.
        image_size: side to which `preprocess` resizes, a multiple of 32.
    """

    hidden_size = 768

    def __init__(self, state: dict[str, Tensor], image_size: int = 160):
        super().__init__()
        if image_size <= 0 or image_size % 32:
            raise ValueError(f"image_size: expected a positive multiple of 32, got {image_size}")
        self.image_size = image_size
        self.num_tokens = (image_size // 32) ** 2
        self.stem = FoldedConv(state, "_conv_stem", "_bn0", stride=2)
        self.blocks = nn.ModuleList(Block(state, index) for index in range(NUM_BLOCKS))
        self.head = FoldedConv(state, "_conv_head", "_bn1")
        self.classifier = nn.Linear(*state["_fc.weight"].shape[::-1])
        self.classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
        self.requires_grad_(False)

    def preprocess(self, images: Sequence) -> Tensor:
        """RGB PIL images to a normalised float32 tensor `[n, 3, size, size]`."""
        size = (self.image_size, self.image_size)
        # bicubic, as in the training of these weights
        arrays = [np.asarray(image.convert("RGB").resize(size, resample=3), dtype=np.float32) for image in images]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255.0
        return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]

    def _grids(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(pixel_values)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == FINE_BLOCK:
                fine = x
        return fine, x

    def forward(self, pixel_values: Tensor) -> Tensor:
        fine, coarse = self._grids(pixel_values)
        grid = torch.cat((F.pixel_unshuffle(fine, 2), coarse), dim=1)  # [n, 448 + 320, h, w]
        return grid.flatten(2).transpose(1, 2).contiguous()

    def classify(self, pixel_values: Tensor) -> Tensor:
        """ImageNet logits `[n, 1000]`."""
        _, coarse = self._grids(pixel_values)
        return self.classifier(self.head(coarse).mean((2, 3)))


def load(image_size: int = 160) -> EfficientNetLite0:
    """The encoder with its ImageNet weights, from the asset `efficientnet-lite0`."""
    from mllmcl.assets import asset

    state = torch.load(asset("efficientnet-lite0"), weights_only=True, map_location="cpu")
    return EfficientNetLite0(state, image_size).eval()
