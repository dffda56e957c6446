"""SmolLM2-135M-Instruct from its GGUF file, converted once to a folder that transformers reads.

Source: Allal et al., SmolLM2 (2025), Apache-2.0; the asset `smollm2-135m-instruct` holds the weights in 4 bits. The
dequantised values fit neither bfloat16 nor float16, so the folder keeps float32.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from mllmcl.files import fsync_file, fsync_folder

__all__ = ["folder", "load"]

#: part of the folder's name; raise it when the conversion changes
CONVERSION = "fp32-1"


def convert(gguf: Path, target: Path) -> None:
    """Write `model.safetensors`, config and tokenizer of a Llama GGUF file to the folder `target`, all or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        import gguf as _gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("reading GGUF weights needs the package gguf: pip install 'mllmcl[pocket]'") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # a model that came from GGUF refuses save_pretrained, so its tensors go into a fresh one
        options = source.config.to_dict()
        options.pop("quantization_config", None)
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**options))
        model.load_state_dict(source.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = source.generation_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        for path in partial.iterdir():
            fsync_file(path)
        try:
            partial.rename(target)
        except OSError:
            # another process finished first
            if not (target / "config.json").exists():
                raise
        fsync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder() -> Path:
    """The converted folder in the cache, made on first use."""
    from mllmcl.assets import asset, cache_dir

    target = cache_dir("models") / f"smollm2-135m-instruct-{CONVERSION}"
    if not (target / "config.json").exists():
        convert(asset("smollm2-135m-instruct"), target)
    return target


def load(num_layers: int | None = None, dtype: torch.dtype = torch.float32):
    """The language model and its tokenizer.

    Args:
        num_layers: keep the first layers only, for quick tests; the cut model has lost its language.
        dtype: of the weights.

    Returns:
        `(LlamaForCausalLM, tokenizer)`.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    path = folder()
    model = LlamaForCausalLM.from_pretrained(path, dtype=dtype)
    if num_layers is not None:
        have = model.config.num_hidden_layers
        if not 1 <= num_layers <= have:
            raise ValueError(f"num_layers: expected 1..{have}, got {num_layers}")
        model.model.layers = model.model.layers[:num_layers]
        model.config.num_hidden_layers = num_layers
    return model.eval(), AutoTokenizer.from_pretrained(path)
