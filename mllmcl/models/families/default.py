"""Any other image-text model of transformers whose processor has a chat template."""

from .base import Family

FAMILY = Family(
    name="default",
    model_types=(),
    language=("model.language_model", "model.text_model", "language_model", "model.decoder"),
    vision=("model.vision_tower", "model.visual", "model.vision_model", "vision_tower", "vision_model"),
    projector=(
        "model.multi_modal_projector",
        "model.connector",
        "model.aligner",
        "model.visual.merger",
        "multi_modal_projector",
    ),
)
