"""Training steps with experts on all seven linears of every decoder layer: one block, and a whole LLaVA of 7 B.

Weights are drawn at random. Contestants share the frozen ones and have adapters and optimizer of their own.
"""

# B samples, S positions, K in, N out, E experts, r rank of one expert, V vocabulary

from __future__ import annotations

import copy
import gc
import importlib.util
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaModel, LlavaConfig, LlavaForConditionalGeneration

from mllmcl.models import ExpertLinear, ExpertState
from mllmcl.models.sharing import join
from mllmcl_kernels import MaskedAdamW

from .cases import ModelCase
from .measuring import RESULTS, Case, misses, providers_used, race

OURS = ("ours", "ours, inputs shared")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALING, LR = 2.0, 1e-4
VOCABULARY, IMAGE_ID = 32064, 32000


class LoopLinear(nn.Module):
    """MoE-LoRA as CoIN and MCITlib write it: a router, then the experts one after the other, each on all tokens."""

    def __init__(self, base: nn.Linear, experts: int, rank: int):
        super().__init__()
        self.base = base
        shape = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.router = nn.Linear(base.in_features, experts, **shape)
        self.a = nn.ModuleList(nn.Linear(base.in_features, rank, **shape) for _ in range(experts))
        self.b = nn.ModuleList(nn.Linear(rank, base.out_features, **shape) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.softmax(self.router(x), -1)
        y = self.base(x)
        for expert, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            y += b(a(x)) * SCALING * gates[..., expert, None]
        return y


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares every parameter and buffer."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def replace_linears(model: nn.Module, make: Callable[[nn.Linear, str], nn.Module]) -> nn.Module:
    """`make(linear, path)` in place of every linear of the language model that has one of the names."""
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in LINEARS and isinstance(module, nn.Linear) and "vision" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module, path))
    return model


def with_experts(model: nn.Module, case: ModelCase, shares: bool = False) -> nn.Module:
    """Expert layers; `shares`: q, k and v, and gate and up, in one pass over their input."""
    state = ExpertState(
        ranks=(case.rank,) * case.experts,
        scaling=(SCALING,) * case.experts,
        trainable=(True,) * case.experts,
        router="softmax",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = replace_linears(twin(model), lambda linear, path: ExpertLinear(linear, state, path))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in experts_of(model, ExpertLinear):
            for parameter, scale in ((module.lora_b, 0.02), (module.router_weight, module.in_features**-0.5)):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    if shares:
        join({layer.path: layer for layer in experts_of(model, ExpertLinear)})
    return model


def with_loop(model: nn.Module, case: ModelCase, like: nn.Module) -> nn.Module:
    """With the numbers of `like`, which has expert layers."""
    model = replace_linears(twin(model), lambda linear, _path: LoopLinear(linear, case.experts, case.rank))
    with torch.no_grad():
        for loop, ours in zip(experts_of(model, LoopLinear), experts_of(like, ExpertLinear), strict=True):
            loop.router.weight.copy_(ours.router_weight)
            for place, (a, b) in enumerate(zip(loop.a, loop.b, strict=True)):
                rows = slice(place * case.rank, (place + 1) * case.rank)
                a.weight.copy_(ours.lora_a[rows])
                b.weight.copy_(ours.lora_b[:, rows])
    return model


def experts_of(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def with_peft(model: nn.Module, case: ModelCase, casts: bool) -> nn.Module:
    """PEFT has no mixture of LoRA experts: one adapter of all their ranks."""
    from peft import LoraConfig, get_peft_model

    rank = case.experts * case.rank
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=rf".*({'|'.join(LINEARS)})", bias="none")
    config.exclude_modules = r".*vision.*"
    return get_peft_model(twin(model), config, autocast_adapter_dtype=casts)


def build(case: ModelCase, device: torch.device, dtype: torch.dtype) -> nn.Module:
    text = LlamaConfig(
        vocab_size=VOCABULARY if case.model == "LLaVA" else 64,
        hidden_size=case.width,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            if case.model == "block":
                return LlamaModel(text).requires_grad_(False)
            small = case.layers < 8
            vision = CLIPVisionConfig(
                hidden_size=32 if small else 1024,
                intermediate_size=48 if small else 4096,
                num_hidden_layers=2 if small else 24,
                num_attention_heads=2 if small else 16,
                image_size=28 if small else 336,
                patch_size=14,
            )
            config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
            return LlavaForConditionalGeneration(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stepper(model: nn.Module, loss: Callable[[nn.Module], Tensor], ours: bool) -> Callable[[], None]:
    """Forward, backward and a step of the optimizer."""
    parameters = trained(model)
    if not parameters:
        return lambda: loss(model).backward()
    kind, options = (MaskedAdamW, {}) if ours else (torch.optim.AdamW, {"fused": True})
    optimizer = kind(parameters, lr=LR, weight_decay=0.0, **options)

    def step() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def saved_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor], there: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps between forward and backward besides weights and inputs."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *there)}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model)
    return sum(sizes.values())


def contestants(base: nn.Module, case: ModelCase, record: Case) -> dict[str, nn.Module]:
    models = {"ours": with_experts(base, case)}
    models["ours, inputs shared"] = with_experts(base, case, shares=True)
    models["loop over experts"] = with_loop(base, case, models["ours"])
    if importlib.util.find_spec("peft") is None:
        record.refused["PEFT"] = "the package peft is not installed"
    else:
        models["PEFT, one adapter"] = with_peft(base, case, True)
        if next(base.parameters()).dtype != torch.float32:
            models["PEFT, one adapter, not cast"] = with_peft(base, case, False)
    models["base model"] = base
    return models


def first_steps(models: dict[str, nn.Module], loss, record: Case) -> dict[str, Callable]:
    """A step of each; one that does not fit into the device's memory is let go and told."""
    steps = {}
    for name in list(models):
        try:
            steps[name] = stepper(models[name], loss, name.startswith("ours"))
            steps[name]()
        except torch.OutOfMemoryError:
            record.refused[name] = "out of the device's memory"
            steps.pop(name, None)
            models.pop(name)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return steps


def finish(benchmark, record: Case, steps: dict[str, Callable], device, rounds: int) -> None:
    race(record, steps, device, rounds, warm=1)
    benchmark.extra_info["interleaved seconds"] = record.seconds
    benchmark.pedantic(steps["ours"], rounds=1)


def refused_block(models: dict[str, nn.Module], base: nn.Module, case: ModelCase, given: Tensor) -> str | None:
    """Why the block's outputs or the gradient of its input are not those of the loop over experts in float64."""

    def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = model(inputs_embeds=x, use_cache=False).last_hidden_state
        return [y.detach(), *torch.autograd.grad((y * y).mean(), x)]

    usual = outcome(models["loop over experts"], given)
    truth = outcome(copy.deepcopy(models["loop over experts"]).double(), given.double())
    reasons = {name: misses(outcome(models[name], given), usual, truth, ("y", "dx")) for name in OURS}
    return next((f"{name}: {reason}" for name, reason in reasons.items() if reason), None)


def test_block_step(benchmark, block_case: ModelCase, device, dtype, rounds):
    case = block_case
    torch.manual_seed(0)
    base = build(case, device, dtype)
    x = torch.randn(case.samples, case.length, case.width, device=device, dtype=dtype).requires_grad_()

    def loss(model: nn.Module) -> Tensor:
        x.grad = None
        return model(inputs_embeds=x, use_cache=False).last_hidden_state.float().square().mean()

    record = Case("model step", f"{case}, {str(dtype).removeprefix('torch.')}")
    RESULTS.append(record)
    models = contestants(base, case, record)
    with providers_used() as record.providers:
        reason = refused_block(models, base, case, x)
    assert reason is None, reason
    saved = {name: saved_bytes(model, loss, [x]) for name, model in models.items()}
    record.notes = {f"{name}, bytes saved by adapters": saved[name] - saved["base model"] for name in models}
    del record.notes["base model, bytes saved by adapters"]
    record.notes["base model, bytes saved"] = saved["base model"]
    finish(benchmark, record, first_steps(models, loss, record), device, max(3, rounds // 5))


def test_llava_step(benchmark, llava_case: ModelCase, device, dtype, rounds, request):
    case, tiny = llava_case, request.config.getoption("--tiny")
    if device.type != "cuda" and not tiny:
        pytest.skip("7 B parameters need a GPU")
    torch.manual_seed(0)
    base = build(case, device, dtype)
    size, images = (28, 4) if tiny else (336, 576)
    pixels = torch.randn(case.samples, 3, size, size, device=device, dtype=dtype)
    ids = torch.randint(3, IMAGE_ID, (case.samples, case.length), device=device)
    ids[:, 1 : 1 + images] = IMAGE_ID
    labels = ids.clone()
    # the answer is what is behind image and question
    labels[:, : (case.length + images) // 2] = -100

    def loss(model: nn.Module) -> Tensor:
        found = model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss
        return found if found.requires_grad else found.clone().requires_grad_()

    record = Case("model step", f"{case}, {str(dtype).removeprefix('torch.')}")
    RESULTS.append(record)
    models = contestants(base, case, record)
    del models["base model"]
    with torch.no_grad(), providers_used() as record.providers:
        losses = {name: float(loss(models[name])) for name in (*OURS, "loop over experts")}
    record.notes = {f"loss, {name}": value for name, value in losses.items()}
    theirs = losses["loop over experts"]
    assert all(abs(losses[name] - theirs) < 0.02 * abs(theirs) for name in OURS), losses
    finish(benchmark, record, first_steps(models, loss, record), device, max(3, rounds // 10))
