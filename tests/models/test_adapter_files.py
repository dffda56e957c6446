"""Adapter folders, judged by PEFT itself and by their own strict reader."""

from __future__ import annotations

import json
import logging
import shutil
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from mllmcl.models import MLLM
from mllmcl.models.adapter_files import export_expert, export_mixture, read_adapter, write_peft_adapter

from .tiny import fill_experts, make_composed, make_samples

RANKS, SCALING = (4, 8, 3), (2.0, 0.5, 1.1)


@pytest.fixture
def base(folders):
    return LlavaForConditionalGeneration.from_pretrained(folders / "llava").eval()


def language_linears(model) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model" in name
    }


def random_layers(model, rank: int, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B as slices of larger stacks, B not contiguous."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank + 5, linear.in_features, generator=draw)[2 : 2 + rank] * 0.3,
            torch.randn(linear.out_features, rank + 5, generator=draw)[:, 3 : 3 + rank] * 0.3,
        )
        for name, linear in language_linears(model).items()
    }


def model_inputs() -> dict:
    draw = torch.Generator().manual_seed(3)
    text = torch.randint(20, 200, (2, 6), generator=draw)
    return {
        "input_ids": torch.cat((torch.full((2, 4), 3), text), dim=1),
        "pixel_values": torch.randn(2, 3, 28, 28, generator=draw),
    }


def logits_by_hand(model, layers, scaling: float) -> torch.Tensor:
    """Base model plus scaling * (x A^T) B^T, added by hooks on the linears."""

    def adding(a_rK, b_Nr):
        return lambda _module, inputs, output: output + scaling * (inputs[0] @ a_rK.T) @ b_Nr.T

    hooks = [model.get_submodule(path).register_forward_hook(adding(*pair)) for path, pair in layers.items()]
    try:
        with torch.no_grad():
            return model(**model_inputs()).logits
    finally:
        for hook in hooks:
            hook.remove()


def open_in_peft(model, folder, caplog) -> peft.PeftModel:
    """PeftModel.from_pretrained, with every warning and every log line of PEFT an error."""
    caplog.clear()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        # transformers about a name that PEFT uses, whatever the folder holds
        warnings.filterwarnings("ignore", category=FutureWarning)
        opened = peft.PeftModel.from_pretrained(model, str(folder))
    assert [record.getMessage() for record in caplog.records] == []
    return opened.eval()


@pytest.mark.parametrize(("rank", "scaling"), zip(RANKS, SCALING, strict=True))
def test_peft_computes_the_formula(base, tmp_path, caplog, rank, scaling):
    layers = random_layers(base, rank)
    expected = logits_by_hand(base, layers, scaling)
    with torch.no_grad():
        plain = base(**model_inputs()).logits
    assert (expected - plain).abs().max() > 0.05
    write_peft_adapter(tmp_path / "adapter", layers, scaling=scaling, base_model=base.name_or_path)
    opened = open_in_peft(base, tmp_path / "adapter", caplog)
    with torch.no_grad():
        got = opened(**model_inputs()).logits
    assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())
    assert opened.generate(**model_inputs(), max_new_tokens=2).shape[0] == 2


def test_read_back_is_what_was_written(base, tmp_path):
    layers = random_layers(base, 4)
    extra = {"projector": {"model.p.weight": torch.randn(2, 3)}, "router": {"m.router_weight": torch.randn(3, 5)}}
    write_peft_adapter(tmp_path / "a", layers, scaling=1.1, base_model=None, description="Told here.", **extra)
    adapter = read_adapter(tmp_path / "a")
    assert adapter.layers.keys() == layers.keys()
    assert all(
        torch.equal(mine, theirs)
        for path in layers
        for mine, theirs in zip(adapter.layers[path], layers[path], strict=True)
    )
    assert adapter.scaling == pytest.approx(1.1, rel=1e-15)
    assert adapter.config["lora_alpha"] == 4.4
    assert torch.equal(adapter.projector["model.p.weight"], extra["projector"]["model.p.weight"])
    assert torch.equal(adapter.router["m.router_weight"], extra["router"]["m.router_weight"])
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1
    readme = (tmp_path / "a" / "README.md").read_text()
    assert "Told here." in readme and "PEFT cannot express gates" in readme and "projector.safetensors" in readme


def _rename(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def _without_first(tensors):
    return dict(list(tensors.items())[1:])


DAMAGES = {
    "wrong prefix": (lambda t: _rename(t, "base_model.model.", "base_model."), "28 missing .*28 left over"),
    "other tower": (lambda t: _rename(t, "language_model", "text_model"), "28 missing .*28 left over"),
    "adapter name in the key": (lambda t: _rename(t, "lora_A.weight", "lora_A.default.weight"), "14 missing"),
    "missing": (_without_first, r"1 missing \(base_model.model.model.language_model"),
    "left over": (lambda t: {**t, "base_model.model.x.lora_A.weight": torch.zeros(4, 2)}, r"1 left over \(base_model"),
    "shape": (lambda t: {**t, next(iter(t)): torch.zeros(4, 7)}, r"1 tensors of another shape"),
    "rank": (
        lambda t: {name: v[:3] if "lora_A" in name else v[:, :3] for name, v in t.items()},
        "28 tensors of anothe",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_reader_refuses(base, tmp_path, damage):
    layers = {path: pair for path, pair in random_layers(base, 4).items() if "lm_head" not in path}
    assert len(layers) == 14
    write_peft_adapter(tmp_path / "a", layers, scaling=1.0, base_model=None)
    file = tmp_path / "a" / "adapter_model.safetensors"
    change, message = DAMAGES[damage]
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    shapes = {path: (b.shape[0], a.shape[1]) for path, (a, b) in layers.items()}
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(tmp_path / "a", shapes)
    assert str(file) in str(caught.value)
    if damage != "shape":
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path / "a")


def test_peft_only_warns_where_the_reader_raises(base, tmp_path):
    """The reason for the strict reader; if PEFT starts to raise, this says so."""
    write_peft_adapter(tmp_path / "a", random_layers(base, 4), scaling=1.0, base_model=None)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file(_rename(load_file(file), "base_model.model.model", "base_model.model.nowhere"), file)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(base, str(tmp_path / "a"))
    with pytest.raises(ValueError, match="missing"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
        ({"r": 0}, "integer r"),
        ({"target_modules": "all-linear"}, "target_modules must be a list"),
        ({"target_modules": ["elsewhere"]}, "target_modules does not name model.language_model"),
    ],
)
def test_reader_refuses_config(base, tmp_path, change, message):
    layers = random_layers(base, 4)
    write_peft_adapter(tmp_path / "a", layers, scaling=1.0, base_model=None)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "a", {path: (b.shape[0], a.shape[1]) for path, (a, b) in layers.items()})


def test_reads_what_peft_saved(base, tmp_path):
    """A folder by PEFT, short target names and all, is read when the model says which layers there are."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "p")
    shapes = {
        name.removeprefix("base_model.model."): (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    adapter = read_adapter(tmp_path / "p", shapes)
    assert adapter.scaling == 2.0 and adapter.layers.keys() == shapes.keys()
    with pytest.raises(ValueError, match=r"4 missing .*left over"):
        read_adapter(tmp_path / "p")


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({}, ValueError, "at least one"),
        ({"a": (torch.zeros(2, 3), torch.zeros(4, 3))}, ValueError, r"A \[r, in\] and B \[out, r\]"),
        ({"a": (torch.zeros(2, 3), torch.zeros(4, 2)), "b": (torch.zeros(1, 3), torch.zeros(4, 1))}, ValueError, "one"),
        ({"a": (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 2))}, TypeError, "must be floats"),
    ],
)
def test_writer_refuses(tmp_path, layers, error, message):
    with pytest.raises(error, match=message):
        write_peft_adapter(tmp_path / "a", layers, scaling=1.0, base_model=None)
    assert not (tmp_path / "a").exists()


def test_failed_write_leaves_the_old_folder(base, tmp_path, monkeypatch):
    layers = random_layers(base, 4)
    write_peft_adapter(tmp_path / "a", layers, scaling=1.0, base_model=None)

    def spoiled(tensors, path):
        save_file(dict(list({k: v.contiguous() for k, v in tensors.items()}.items())[1:]), path)

    monkeypatch.setattr("mllmcl.models.adapter_files._save", spoiled)
    with pytest.raises(ValueError, match="1 missing"):
        write_peft_adapter(tmp_path / "a", random_layers(base, 4, seed=1), scaling=3.0, base_model=None)
    monkeypatch.undo()
    adapter = read_adapter(tmp_path / "a")
    assert adapter.scaling == 1.0
    assert all(torch.equal(adapter.layers[path][0], layers[path][0]) for path in layers)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# -- from a model


@pytest.fixture
def experts(folders):
    mllm = MLLM.from_pretrained(folders / "llava")
    mllm.add_experts(3, list(RANKS), [rank * scale for rank, scale in zip(RANKS, SCALING, strict=True)], dropout=0.0)
    fill_experts(mllm)
    return mllm


def mllm_logits(mllm, gates) -> torch.Tensor:
    with mllm.use_experts(gates), torch.no_grad():
        return mllm.eval().model(**model_inputs()).logits


@pytest.mark.parametrize("expert", range(3))
def test_exported_expert_opens_in_peft(experts, folders, tmp_path, caplog, expert):
    export_expert(experts, expert, tmp_path / "e")
    fresh = LlavaForConditionalGeneration.from_pretrained(folders / "llava").eval()
    expected = mllm_logits(experts, torch.tensor([expert, expert]))
    assert (expected - mllm_logits(experts, "off")).abs().max() > 0.05
    with torch.no_grad():
        got = open_in_peft(fresh, tmp_path / "e", caplog)(**model_inputs()).logits
    assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())
    config = json.loads((tmp_path / "e" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders / "llava")
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_exported_mixture_opens_in_peft(experts, folders, tmp_path, caplog):
    gates = torch.tensor([0.5, 0.0, -1.25])
    export_mixture(experts, gates, tmp_path / "m")
    fresh = LlavaForConditionalGeneration.from_pretrained(folders / "llava").eval()
    expected = mllm_logits(experts, gates)
    with torch.no_grad():
        got = open_in_peft(fresh, tmp_path / "m", caplog)(**model_inputs()).logits
    assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())
    adapter = read_adapter(tmp_path / "m")
    assert adapter.config["r"] == sum(RANKS) and adapter.scaling == 1.0


def test_expert_with_its_own_projector(folders, tmp_path, caplog):
    mllm = MLLM.from_pretrained(folders / "llava")
    mllm.add_experts(2, 4, 8, dropout=0.0, projector_experts=True)
    fill_experts(mllm)
    export_expert(mllm, 1, tmp_path / "e")
    adapter = read_adapter(tmp_path / "e")
    assert adapter.projector
    fresh = LlavaForConditionalGeneration.from_pretrained(folders / "llava").eval()
    parameters = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, value in adapter.projector.items():
            parameters[name].copy_(value)
        got = open_in_peft(fresh, tmp_path / "e", caplog)(**model_inputs()).logits
    expected = mllm_logits(mllm, torch.tensor([1, 1]))
    assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())
    with pytest.raises(ValueError, match="owns a projector"):
        export_mixture(mllm, [1.0, 1.0], tmp_path / "m")


def test_routers_travel_beside_the_adapter(folders, tmp_path):
    mllm = MLLM.from_pretrained(folders / "llava")
    mllm.add_experts(2, 4, 8, router="softmax")
    export_expert(mllm, 0, tmp_path / "e")
    adapter = read_adapter(tmp_path / "e")
    assert adapter.router.keys() == {f"{path}.router_weight" for path in mllm.expert_layers}
    assert all(
        torch.equal(adapter.router[f"{p}.router_weight"], layer.router_weight)
        for p, layer in mllm.expert_layers.items()
    )
    assert "cannot express gates" in (tmp_path / "e" / "README.md").read_text()


def test_composed_model(tmp_path, caplog):
    mllm = make_composed()
    mllm.add_experts(2, 3, 6, dropout=0.0)
    fill_experts(mllm)
    export_expert(mllm, 1, tmp_path / "e")
    batch = mllm.collate(make_samples("composed"), with_answers=True)
    with mllm.use_experts(torch.ones(len(batch.sample_ids), dtype=torch.int64)):
        expected = mllm.eval().answer_logits(batch).detach()
    adapter = read_adapter(tmp_path / "e")
    assert adapter.config["task_type"] is None
    fresh = make_composed()
    parameters = dict(fresh.model.named_parameters())
    assert adapter.projector.keys() <= parameters.keys() and adapter.projector
    open_in_peft(fresh.model, tmp_path / "e", caplog)
    got = fresh.eval().answer_logits(batch).detach()
    assert (got - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())


def test_export_again_replaces(experts, tmp_path):
    export_expert(experts, 0, tmp_path / "e")
    shutil.copy(tmp_path / "e" / "README.md", tmp_path / "e" / "stale.txt")
    export_expert(experts, 1, tmp_path / "e")
    assert read_adapter(tmp_path / "e").config["r"] == RANKS[1]
    assert not (tmp_path / "e" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_export_refuses(experts, folders, tmp_path):
    with pytest.raises(ValueError, match=r"0\.\.2, got 3"):
        export_expert(experts, 3, tmp_path / "e")
    with pytest.raises(ValueError, match=r"shape \[3\], got \[2\]"):
        export_mixture(experts, [1.0, 2.0], tmp_path / "e")
    with pytest.raises(ValueError, match="no experts"):
        export_expert(MLLM.from_pretrained(folders / "llava"), 0, tmp_path / "e")
