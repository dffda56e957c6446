"""The LLaVA recipe from two backbones: frozen vision encoder, projector, language model.

Source: Liu et al., Visual Instruction Tuning (2023); the projector is LLaVA-1.5's mlp2x_gelu.
"""

# B samples, S positions, M images, P tokens of an image, D width of the language model

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..options import check_model_name

__all__ = ["IMAGE_TOKEN_ID", "ComposedModel", "Projector", "load_language"]

#: the id that stands for one image token in `input_ids`; below zero, so that no text can produce it
IMAGE_TOKEN_ID = -200


class Projector(nn.Module):
    """Linear, GELU, Linear: `[..., vision width]` to `[..., language width]`."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width_out)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(width_out, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(x)))


PROJECTORS = {"mlp2x_gelu": Projector}


class ComposedModel(nn.Module):
    """Vision encoder, projector and causal language model as one module.

    Args:
        vision: an encoder, see `mllmcl.models.vision`.
        language: a causal language model of transformers.
        projector: a name in `PROJECTORS`.
    """

    def __init__(self, vision: nn.Module, language: nn.Module, projector: str = "mlp2x_gelu"):
        super().__init__()
        if projector not in PROJECTORS:
            raise ValueError(f"projector: expected one of {', '.join(PROJECTORS)}, got {projector!r}")
        self.vision = vision
        self.projector = PROJECTORS[projector](vision.hidden_size, language.config.hidden_size)
        self.language = language
        self.config = SimpleNamespace(
            model_type="mllmcl_composed", image_token_id=IMAGE_TOKEN_ID, text_config=language.config
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.language.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.language.get_input_embeddings()

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """Token embeddings `[B, S, D]` with the projected features `[M, P, vision width]` at the image positions."""
        at_image = input_ids == IMAGE_TOKEN_ID
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(at_image, 0))
        if image_features is None:
            return embeddings
        projected = self.projector(image_features.to(embeddings.dtype))
        return embeddings.masked_scatter(at_image[..., None], projected.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        image_features: Tensor | None = None,
        past_key_values=None,
        use_cache: bool = False,
    ):
        """The language model's output before its head: `.last_hidden_state` `[B, S, D]` and `.past_key_values`."""
        return self.language.base_model(
            inputs_embeds=self.embed(input_ids, image_features),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )


def load_language(language: str | nn.Module, tokenizer=None, num_layers: int | None = None, dtype=torch.float32):
    """A causal language model and its tokenizer: an asset, a name or folder of transformers, or given ones."""
    if isinstance(language, nn.Module):
        if tokenizer is None:
            raise ValueError("tokenizer: needed where language is a module")
        if num_layers is not None:
            raise ValueError("num_layers: only where language is a name")
        return language.to(dtype), tokenizer
    if language == "smollm2-135m-instruct":
        from . import smollm2

        return smollm2.load(num_layers, dtype)
    if num_layers is not None:
        raise ValueError(f"num_layers: only for smollm2-135m-instruct, got language {language!r}")
    check_model_name("language", language, ("smollm2-135m-instruct",))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    return model.eval(), tokenizer or AutoTokenizer.from_pretrained(language)
