"""Gemma 3, whose processor takes the images of each sample apart."""

from . import default
from .base import Family

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3",),
    language=default.FAMILY.language,
    vision=default.FAMILY.vision,
    projector=default.FAMILY.projector,
    lists_images=True,
)
