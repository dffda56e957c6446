"""Multimodal LLMs with expert layers: any transformers image-text model, or one composed from two backbones."""

from __future__ import annotations

import importlib

_WHERE = {
    "MLLM": ".mllm",
    "Batch": ".batch",
    "ExpertLinear": ".experts",
    "ExpertProjectorLinear": ".experts",
    "ExpertState": ".experts",
    "Selection": ".experts",
    "ComposedModel": ".composed",
    "Prefixes": ".prefixes",
    "Steering": ".steering",
    "SoftPrompts": ".prompts",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    # torch and transformers are imported only when a name is asked for
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)
