"""A training step of every method beside one of plain LoRA with the same total rank and samples, in a second task."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mllmcl import methods
from mllmcl.methods.base import LoraMethod
from mllmcl.models import MLLM
from mllmcl.streams import Sample, Stream, Task
from mllmcl_kernels import MaskedAdamW
from tests.models.tiny import CHAT_TEMPLATE, PatchMeans, make_tokenizer

from .measuring import RESULTS, Case, race

BATCH = 4
#: the step is taken in the stream's second task; what trains in its first one alone is timed there
TASKS = 2


def make_mllm(tiny: bool, device: torch.device) -> MLLM:
    """Layers and vocabulary of SmolLM2-135M, but few of them and drawn at random."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    width = 64 if tiny else 576
    config = LlamaConfig(
        # the head has the share of a step that it has beside all layers
        vocab_size=512 if tiny else 49152 * 4 // 30,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    return MLLM.compose(vision=PatchMeans(), language=LlamaForCausalLM(config), tokenizer=tokenizer, device=device)


@functools.lru_cache
def make_stream(num_train: int) -> Stream:
    """Three tasks whose questions are as long as those of real ones."""
    random = np.random.default_rng(0)
    tasks = []
    for task in range(3):
        words = ("street", "tissue", "market")[task]
        samples = [
            Sample(
                id=f"t{task}/{place}",
                task=f"t{task}",
                question=f"Which kind of {words} is seen in picture {place}? Answer with a word or two.",
                answer=f"{words} {'abcd'[place % 4]}",
                image=random.integers(0, 255, (14, 14, 3), dtype=np.uint8),
            )
            for place in range(num_train)
        ]
        tasks.append(Task(name=f"t{task}", description=f"Pictures of a {words}.", train=samples, test=samples[:2]))
    return Stream(name="made-up", tasks=tuple(tasks), note="made up for benchmarks")


def stepper(name: str, options: dict, tiny: bool, device: torch.device):
    """The model, and a function that takes a step of the last of `TASKS` tasks; None where no task has steps."""
    mllm, stream = make_mllm(tiny, device), make_stream(BATCH if tiny else 4 * BATCH)
    method = methods.create(name, **options)
    method.setup(mllm, stream)
    if mllm.experts is not None:
        # as `mllmcl.train` does
        mllm.lay_experts(by_columns=device.type == "cpu")
    step = None
    for place, task in enumerate(stream.tasks[:TASKS]):
        if place:
            method.on_task_end(stream.tasks[place - 1])
        method.on_task_start(task)
        phases = method.phases(task)
        if phases:
            # a method may train keys first and a router last
            phase = next((phase for phase in phases if phase.name == "train"), phases[0])
            method.on_phase_start(task, phase)
            step = _step_of(mllm, method, task.train[:BATCH])
            step()
    return mllm, step


def _step_of(mllm: MLLM, method, samples: list[Sample]):
    trained = mllm.trained_parameters()
    optimizer = MaskedAdamW(trained.values(), lr=1e-4, max_norm=1.0)
    for name, mask in method.parameter_masks().items():
        if name in trained:
            optimizer.set_mask(trained[name], mask)
    mllm.train()

    def step() -> None:
        batch = mllm.collate(samples, with_answers=True)
        with method.before_forward(samples):
            method.loss(batch, method.answer_loss(batch)).backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize("name", methods.available())
def test_step(benchmark, name, request, device, rounds):
    tiny = request.config.getoption("--tiny")
    mllm, step = stepper(name, {}, tiny, device)
    if step is None:
        pytest.skip("trains nothing")
    rank = sum(mllm.experts.ranks) if mllm.experts is not None and mllm.expert_layers else LoraMethod.rank
    targets = getattr(methods.find(name), "targets", "all-linear")
    _, plain = stepper("lora", {"rank": rank, "targets": targets}, tiny, device)
    record = Case("training step", f"{name}, rank {rank} in all, batch {BATCH}")
    RESULTS.append(record)
    race(record, {"ours": step, "lora": plain}, device, max(3, rounds // 4), warm=1)
    record.notes["of lora's step"] = 1 / record.ratios()["lora"]
    if methods.find(name).extra_passes:
        record.notes["in addition"] = methods.find(name).extra_passes
    benchmark.extra_info["interleaved seconds"] = record.seconds
    benchmark.pedantic(step, rounds=1)
