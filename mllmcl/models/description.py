"""What a model is made of, in words."""

from __future__ import annotations

__all__ = ["described"]


def described(mllm) -> str:
    """See `MLLM.describe`."""
    parameters = list(mllm.model.named_parameters())
    total = sum(value.numel() for _, value in parameters)
    trains = [(name, value) for name, value in parameters if value.requires_grad]
    count = sum(value.numel() for _, value in trains)
    lines = [
        f"{type(mllm.model).__name__}, family {mllm.family.name}: {count:,} of {total:,} parameters train "
        f"({100 * count / total:.2f} %), in {len(trains)} tensors"
    ]
    if mllm.experts is not None:
        state = mllm.experts
        lines.append(
            f"experts: {state.num_experts}, ranks {state.ranks}, scaling {state.scaling}, "
            f"trainable {state.trainable}, dropout {state.dropout}, router {state.router}, "
            f"top-k {state.router_top_k}"
        )
        lines.append(f"expert layers ({len(mllm.expert_layers)}):")
        lines += [f"  {path}" for path in mllm.expert_layers]
        lines += [f"  {path} (a copy for each expert)" for path in mllm.projector_layers]
    lines += [f"attached: {name}: {type(module).__name__}" for name, module in mllm.attached.items()]
    return "\n".join(lines)
