"""LLaVA-like models: a vision transformer, a two-layer projector, a language model; one token for each patch."""

from .base import Family, chat_prompt


def prompt(mllm, question: str, has_image: bool) -> str:
    """The processor's chat template; the Vicuna form of LLaVA-1.5 where the checkpoint has none."""
    if mllm.processor.chat_template is not None:
        return chat_prompt(mllm, question, has_image)
    image = f"{mllm.processor.image_token}\n" if has_image else ""
    return f"USER: {image}{question} ASSISTANT:"


FAMILY = Family(
    name="llava",
    model_types=("llava", "vipllava"),
    language=("model.language_model",),
    vision=("model.vision_tower",),
    projector=("model.multi_modal_projector",),
    prompt=prompt,
)
