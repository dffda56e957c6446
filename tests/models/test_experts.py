"""Expert layers: where they go, what they compute, what trains, what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mllmcl.models import MLLM, ExpertLinear, ExpertProjectorLinear, ExpertState
from mllmcl.models.experts import Selection, select, with_batch
from mllmcl.models.targets import LINEAR_KINDS

from .tiny import fill_experts, make_samples


def logits(mllm, samples, gates):
    with torch.no_grad(), mllm.use_experts(gates):
        return mllm.answer_logits(mllm.collate(samples, with_answers=True))


def test_all_linear_is_the_seven_kinds_of_the_language_tower(mllm):
    before = {name for name, module in mllm.model.named_modules() if isinstance(module, nn.Linear)}
    mllm.add_experts(2, rank=2, alpha=4)
    after = {name for name, module in mllm.model.named_modules() if isinstance(module, nn.Linear)}
    assert before - after == set(mllm.expert_layers)
    assert len(mllm.expert_layers) == 2 * 7
    assert {path.rsplit(".", 1)[-1] for path in mllm.expert_layers} == set(LINEAR_KINDS)
    assert all(path.startswith(f"{mllm.language_path}.") for path in mllm.expert_layers)
    vision = mllm.model.get_submodule(mllm.vision_path)
    assert not any(isinstance(module, ExpertLinear) for module in vision.modules())
    assert isinstance(mllm.head, nn.Linear)
    for path, layer in mllm.expert_layers.items():
        assert mllm.model.get_submodule(path) is layer


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["layers.0.mlp.up_proj"], 1),
        (r".*layers\.1\.self_attn\..*", 4),
        (["q_proj", r".*\.1\.mlp\.down_proj"], 3),
    ],
)
def test_targets(build, targets, want):
    mllm = build("llava").add_experts(1, rank=2, alpha=4, targets=targets)
    assert len(mllm.expert_layers) == want


def test_matching_nothing_says_what_could_match(mllm):
    with pytest.raises(ValueError, match=r"'qkv_proj' matches no linear of the language tower, which has down_proj"):
        mllm.add_experts(1, rank=2, alpha=4, targets=["q_proj", "qkv_proj"])
    assert mllm.experts is None and not mllm.expert_layers
    vision = next(
        n for n, m in mllm.model.named_modules() if n.startswith(mllm.vision_path) and not len(list(m.children()))
    )
    with pytest.raises(ValueError, match="matches no linear of the language tower"):
        mllm.add_experts(1, rank=2, alpha=4, targets=[vision])
    with pytest.raises(ValueError, match="'proj' matches no linear"):
        mllm.add_experts(1, rank=2, alpha=4, targets=["proj"])
    with pytest.raises(ValueError, match="lm_head"):
        mllm.add_experts(1, rank=2, alpha=4, targets=["lm_head"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"rank": [2, 2, 2]}, "rank: expected one number or 2"),
        ({"rank": 0}, "rank: expected positive"),
        ({"rank": 2.5}, "rank: expected positive"),
        ({"alpha": -1.0}, "alpha: expected positive"),
        ({"dropout": 1.0}, "dropout"),
        ({"router": "dice"}, "router: expected None or one of softmax"),
        ({"router_top_k": 1}, "together with a router"),
        ({"router": "softmax", "router_top_k": 3}, r"router_top_k: expected 1\.\.2"),
        ({"targets": []}, "targets"),
    ],
)
def test_wrong_options_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build("composed").add_experts(**{"num_experts": 2, "rank": 2, "alpha": 4, **options})


def test_options_of_another_type_are_named(build):
    mllm = build("composed")
    for name, value in {"num_experts": 1.5, "rank": "a", "alpha": None, "dropout": "x", "router_top_k": 1.5}.items():
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            mllm.add_experts(**{"num_experts": 2, "rank": 2, "alpha": 4, "router": "softmax", name: value})
    with pytest.raises(ValueError, match="alpha: expected positive"):
        mllm.add_experts(2, rank=2, alpha=float("nan"))


def test_fresh_experts_are_the_base(mllm, samples):
    base = logits(mllm, samples, None)
    mllm.add_experts(2, rank=[2, 4], alpha=8, projector_experts=True, dropout=0.5)
    torch.testing.assert_close(logits(mllm, samples, [0, 1] * 4), base, rtol=1e-5, atol=1e-5)


def test_minus_one_and_off_are_the_base_bit_for_bit(mllm, samples):
    base = logits(mllm, samples, None)
    mllm.add_experts(2, rank=2, alpha=8, projector_experts=True)
    fill_experts(mllm)
    assert torch.equal(logits(mllm, samples, "off"), base)
    assert torch.equal(logits(mllm, samples, [-1] * 8), base)
    assert not torch.allclose(logits(mllm, samples, [0] * 8), base, atol=1e-2)
    # in a mixed batch the base rows go through another kernel
    mixed = logits(mllm, samples, [-1] * 7 + [1])
    batch = mllm.collate(samples, with_answers=True)
    of_base = batch.answer_positions < 7 * batch.input_ids.shape[1]
    torch.testing.assert_close(mixed[of_base], base[of_base], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gates", ["one", "each", "sample", "ids"])
def test_an_expert_layer_against_the_formula(gates):
    torch.manual_seed(0)
    ranks, scaling, base = (2, 3, 1), (0.5, 2.0, 1.0), nn.Linear(6, 5)
    layer = ExpertLinear(base, ExpertState(ranks=ranks, scaling=scaling, trainable=(True,) * 3), "layer")
    nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 7, 6)
    weights, given = {
        "one": (torch.ones(4, 3), None),
        "each": (torch.tensor([0.2, 0.0, 0.8]).expand(4, 3), torch.tensor([0.2, 0.0, 0.8])),
        "sample": ((w := torch.rand(4, 3)), w),
        "ids": (torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1.0]]), torch.tensor([1, 0, -1, 2])),
    }[gates]
    want = base(x)
    for expert, (rank, scale) in enumerate(zip(ranks, scaling, strict=True)):
        rows = slice(sum(ranks[:expert]), sum(ranks[:expert]) + rank)
        part = F.linear(F.linear(x, layer.lora_a[rows]), layer.lora_b[:, rows]) * scale
        want = want + weights[:, expert, None, None] * part
    with layer.state.using(select(layer.state, given, x.device)):
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_one_expert_for_all_takes_only_its_rows():
    """The short cut for a batch of one expert equals the mixed path, in value and in gradient."""
    torch.manual_seed(0)
    state = ExpertState(ranks=(2, 3), scaling=(1.0, 2.0), trainable=(True, True))
    layer = ExpertLinear(nn.Linear(6, 5).requires_grad_(False), state, "layer")
    nn.init.normal_(layer.lora_b)
    x, outcomes = torch.randn(4, 7, 6), []
    chosen = select(state, [1] * 4, x.device)
    assert chosen.uniform == 1
    for selection in (chosen, Selection(gates=chosen.gates)):
        with state.using(selection):
            y = layer(x)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), (layer.lora_a, layer.lora_b))))
    for short, full in zip(*outcomes, strict=True):
        torch.testing.assert_close(short, full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "cosine"])
def test_learned_router(mllm, samples, score):
    mllm.add_experts(3, rank=2, alpha=8, router=score, router_top_k=2, dropout=0.0)
    fill_experts(mllm)
    mllm.experts.collect = True
    together = logits(mllm, samples, None)
    assert set(mllm.experts.loads()) == set(mllm.expert_layers)
    batch = mllm.collate(samples, with_answers=True)
    path = next(iter(mllm.expert_layers))
    routing = mllm.experts.routings[path]
    assert routing.gates.shape == (*batch.input_ids.shape, 3)
    assert int((routing.gates != 0).sum(-1).max()) == 2
    mllm.experts.collect = False
    alone = torch.cat([logits(mllm, [sample], None) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_pads_do_not_count_in_the_load(build):
    mllm = build("composed").add_experts(2, rank=2, alpha=8, router="softmax", targets=["layers.0.self_attn.q_proj"])
    fill_experts(mllm)
    samples = make_samples("composed")
    mllm.experts.collect = True
    logits(mllm, samples, None)
    (routing,) = mllm.experts.routings.values()
    mask = mllm.collate(samples, with_answers=True).attention_mask.bool()
    assert not bool(mask.all())
    torch.testing.assert_close(routing.importance, routing.gates[mask].sum(0), rtol=1e-4, atol=1e-4)
    assert float(routing.load.sum()) == 2 * int(mask.sum())


# -- projector


def test_projector_swap_in_a_batch_equals_each_alone(mllm, samples):
    mllm.add_experts(3, rank=2, alpha=8, projector_experts=True, dropout=0.0)
    fill_experts(mllm)
    assert mllm.projector_layers
    ids = [0, 1, 2, -1, 2, 1, 0, -1]
    together = logits(mllm, samples, ids)
    alone = torch.cat([logits(mllm, [sample], [expert]) for sample, expert in zip(samples, ids, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    # the copies matter: with the LoRA of expert 0 and the projector of the base the answer is another
    with torch.no_grad():
        for layer in mllm.projector_layers.values():
            layer.expert_weight.copy_(layer.weight.expand_as(layer.expert_weight))
    assert not torch.allclose(logits(mllm, samples, ids), together, atol=1e-2)


@pytest.mark.parametrize("uniform", [False, True])
def test_only_chosen_trainable_projector_copies_get_gradients(uniform):
    torch.manual_seed(0)
    state = ExpertState(ranks=(1, 1, 1), scaling=(1.0,) * 3, trainable=(True, False, True))
    layer = ExpertProjectorLinear(nn.Linear(6, 5).requires_grad_(False), state, "projector")
    ids = torch.tensor([1, 1, 1] if uniform else [0, 1, -1])
    x = torch.randn(3, 4, 6, requires_grad=True)
    selection = with_batch(select(state, ids, x.device), None, (0, 1, 2), (4, 4, 4))
    with state.using(selection):
        layer(x).square().sum().backward()
    assert x.grad.abs().sum(-1).min() > 0
    if uniform:
        assert layer.expert_weight.grad is None
    else:
        per_expert = layer.expert_weight.grad.abs().sum((1, 2))
        assert per_expert[0] > 0 and per_expert[1] == 0 and per_expert[2] == 0


def test_projector_copies_need_ids(mllm, samples):
    mllm.add_experts(2, rank=2, alpha=8, projector_experts=True)
    with pytest.raises(ValueError, match="gates have to be expert ids"):
        logits(mllm, samples, torch.tensor([0.5, 0.5]))


def test_a_single_expert_owns_the_projector_without_being_named(mllm, samples):
    mllm.add_experts(1, rank=2, alpha=8, projector_experts=True)
    fill_experts(mllm)
    named = logits(mllm, samples, [0] * 8)
    assert torch.equal(logits(mllm, samples, None), named)
    mllm.grow_experts(1)
    assert torch.equal(logits(mllm, samples, [0] * 8), named)
    with pytest.raises(ValueError, match="gates have to be expert ids"):
        logits(mllm, samples, None)


# -- what trains


@pytest.mark.parametrize("checkpointed_before", [False, True])
def test_gradients_are_the_same_with_checkpointing(build, family, samples, checkpointed_before):
    """Every trainable tensor has a gradient, and recomputing after the context has ended sees the same experts."""
    outcomes = []
    for checkpoint in (False, True):
        mllm = build(family)
        if checkpoint and checkpointed_before:
            mllm.enable_checkpointing()
        torch.manual_seed(3)
        mllm.add_experts(2, rank=[2, 3], alpha=8, projector_experts=True, dropout=0.1)
        fill_experts(mllm)
        mllm.set_trainable([True, True], projector=True)
        if checkpoint and not checkpointed_before:
            mllm.enable_checkpointing()
        mllm.train()
        recomputed = count_calls(mllm)
        torch.manual_seed(4)
        with mllm.use_experts([0, 1] * 4):
            loss = mllm.loss(mllm.collate(samples, with_answers=True))
        loss.backward()
        assert recomputed() == (2 if checkpoint else 1)
        trains = {name: p.grad for name, p in mllm.model.named_parameters() if p.requires_grad}
        assert set(trains) == {name for name in mllm.trainable_state() if "lora" in name or "expert_" in name}
        for name, grad in trains.items():
            assert grad is not None and grad.abs().max() > 0, name
        outcomes.append((loss.detach(), trains))
        assert len(mllm.generate(samples, [0, 1] * 4, max_new_tokens=2)) == 8
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for name, grad in outcomes[0][1].items():
        torch.testing.assert_close(outcomes[1][1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


ROUTED = {
    "float gates": lambda: torch.rand(8, 2),
    "ids": lambda: [0, 1, -1, 1] * 2,
    "learned router": lambda: None,
}


@pytest.mark.parametrize("kind", ROUTED)
def test_autocast_gradients_are_the_same_with_checkpointing(build, family, samples, kind):
    """bfloat16, backward after both contexts have ended; a router also learns from its balance loss."""
    is_learned, gates = kind == "learned router", ROUTED[kind]()
    outcomes = []
    for checkpoint in (False, True):
        mllm = build(family)
        torch.manual_seed(3)
        router = {"router": "softmax", "router_top_k": 1} if is_learned else {}
        mllm.add_experts(2, rank=[2, 3], alpha=8, projector_experts=kind == "ids", dropout=0.1, **router)
        fill_experts(mllm)
        mllm.set_trainable([True, True], projector=kind == "ids", router=is_learned)
        if checkpoint:
            mllm.enable_checkpointing()
        mllm.train()
        recomputed = count_calls(mllm)
        torch.manual_seed(4)
        with mllm.use_experts(gates), mllm.experts.collecting(), torch.autocast("cpu", torch.bfloat16):
            logits = mllm.answer_logits(batch := mllm.collate(samples, with_answers=True))
            loss = F.cross_entropy(logits.float(), batch.answer_labels)
            loss = loss + sum(routing.balance_loss() for routing in mllm.experts.routings.values())
        assert logits.dtype == torch.bfloat16
        loss.backward()
        assert recomputed() == (2 if checkpoint else 1)
        trains = {name: p.grad for name, p in mllm.model.named_parameters() if p.requires_grad}
        for name, grad in trains.items():
            assert grad.dtype == torch.float32 and grad.abs().max() > 0, name
        assert any("router" in name for name in trains) == is_learned
        outcomes.append({"logits": logits.detach(), "loss": loss.detach(), **trains})
    assert len(outcomes[0]) >= 2 + 2 * 14
    for name, value in outcomes[0].items():
        assert torch.equal(outcomes[1][name], value), name


def count_calls(mllm):
    calls = []
    layer = next(iter(mllm.expert_layers.values()))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


def test_set_trainable(build):
    mllm = build("llava").add_experts(2, rank=2, alpha=4, router="softmax")
    names = {name for name, p in mllm.model.named_parameters() if p.requires_grad}
    assert names == {n for n in mllm.trainable_state() if not n.startswith("model.multi_modal_projector")}
    mllm.set_trainable([False, True], projector=True)
    assert mllm.experts.trainable == (False, True)
    names = {name for name, p in mllm.model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"lora_a", "lora_b", "weight", "bias"}
    mllm.set_trainable([False, False], router=True)
    names = {name for name, p in mllm.model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"router_weight"}
    with pytest.raises(ValueError, match="expected 2 booleans, got 3"):
        mllm.set_trainable([True] * 3)


def test_a_frozen_expert_gets_no_gradient(mllm, samples):
    mllm.add_experts(2, rank=2, alpha=8, dropout=0.0)
    fill_experts(mllm)
    mllm.set_trainable([False, True])
    mllm.loss(mllm.collate(samples, with_answers=True)).backward()
    for layer in mllm.expert_layers.values():
        assert layer.lora_a.grad[:2].abs().max() == 0 and layer.lora_b.grad[:, :2].abs().max() == 0
        assert layer.lora_a.grad[2:].abs().max() > 0 and layer.lora_b.grad[:, 2:].abs().max() > 0


def test_dropout_acts_in_training_only(mllm, samples):
    mllm.add_experts(1, rank=2, alpha=8, dropout=0.5)
    fill_experts(mllm)
    mllm.eval()
    assert torch.equal(logits(mllm, samples, None), logits(mllm, samples, None))
    mllm.train()
    assert not torch.equal(logits(mllm, samples, None), logits(mllm, samples, None))


def test_masks_fit_the_optimizer(build):
    mllm = build("composed").add_experts(2, rank=[1, 2], alpha=4, projector_experts=True)
    mllm.set_trainable([True, False], projector=True)
    state, masks = mllm.trainable_state(), mllm.parameter_masks()
    assert set(masks) == {name for name in state if "lora" in name or "expert_" in name}
    for name, mask in masks.items():
        mask.check("test", name, state[name])
    layer = next(iter(mllm.expert_layers))
    assert masks[f"{layer}.lora_a"].tensor.tolist() == [1, 0, 0]


# -- growing and keeping


def test_growing_keeps_old_experts_bit_for_bit(mllm, samples):
    mllm.add_experts(2, rank=[2, 3], alpha=6, router="softmax", projector_experts=True, dropout=0.0)
    fill_experts(mllm)
    old = {name: value.clone() for name, value in mllm.trainable_state().items()}
    alone, mixed = logits(mllm, samples, [1] * 8), logits(mllm, samples, [0, 1] * 4)
    mllm.grow_experts(2, rank=[1, 4])
    assert mllm.experts.ranks == (2, 3, 1, 4)
    assert mllm.experts.scaling == (3.0, 2.0, 6.0, 1.5)
    for path, layer in mllm.expert_layers.items():
        assert torch.equal(layer.lora_a[:5], old[f"{path}.lora_a"])
        assert torch.equal(layer.lora_b[:, :5], old[f"{path}.lora_b"])
        assert torch.equal(layer.router_weight[:2], old[f"{path}.router_weight"])
        assert layer.lora_b[:, 5:].abs().max() == 0 and layer.lora_a[5:].abs().max() > 0
    for path, layer in mllm.projector_layers.items():
        assert torch.equal(layer.expert_weight[:2], old[f"{path}.expert_weight"])
        assert torch.equal(layer.expert_weight[2], layer.weight)
    assert torch.equal(logits(mllm, samples, [1] * 8), alone)
    # in a mixed batch the products have another shape, so the sums may round in another order
    torch.testing.assert_close(logits(mllm, samples, [0, 1] * 4), mixed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(mllm, samples, [2] * 8), logits(mllm, samples, "off"), rtol=1e-5, atol=1e-5)


def test_b_by_columns_is_the_same_model(mllm, samples):
    """Same parameters, outputs and gradients, one expert or several; what grows lies alike; and back."""
    mllm.add_experts(3, rank=[2, 3, 1], alpha=6, dropout=0.0)
    fill_experts(mllm)
    layers = mllm.expert_layers.values()
    held, batch = [layer.lora_b for layer in layers], mllm.collate(samples, with_answers=True)

    def learn(gates) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with mllm.use_experts(gates):
            loss = mllm.loss(batch)
        return loss, list(torch.autograd.grad(loss, held))

    for gates in ([1] * 8, [0, 1, 2, -1] * 2, torch.tensor([0.5, 0.2, 0.3])):
        mllm.lay_experts(by_columns=False)
        rows = learn(gates)
        mllm.lay_experts(by_columns=True)
        assert all(layer.lora_b is b and b.stride() == (1, len(b)) for layer, b in zip(layers, held, strict=True))
        columns = learn(gates)
        torch.testing.assert_close(columns, rows, rtol=1e-4, atol=1e-5)
        assert all(grad.stride() == b.stride() for grad, b in zip(columns[1], held, strict=True))
    old = [b.detach().clone() for b in held]
    mllm.grow_experts(1, rank=2)
    for layer, b in zip(layers, old, strict=True):
        assert layer.lora_b.stride() == (1, len(b)) and torch.equal(layer.lora_b[:, :6], b)
    mllm.lay_experts(by_columns=False).grow_experts(1, rank=2)
    assert all(layer.lora_b.is_contiguous() for layer in layers)


def test_laying_without_experts_is_refused(mllm):
    with pytest.raises(ValueError, match="no experts to lay"):
        mllm.lay_experts(by_columns=True)


def test_lora_a_is_drawn_as_peft_does(build):
    torch.manual_seed(5)
    mllm = build("composed").add_experts(1, rank=64, alpha=4, targets=["layers.0.mlp.down_proj"])
    (layer,) = mllm.expert_layers.values()
    bound = 1 / layer.in_features**0.5
    assert layer.lora_a.abs().max() <= bound
    assert float(layer.lora_a.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    torch.manual_seed(5)
    again = build("composed")
    torch.manual_seed(7)
    first = build("composed").add_experts(1, rank=2, alpha=4).trainable_state()
    torch.manual_seed(7)
    second = build("composed").add_experts(1, rank=2, alpha=4).trainable_state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.experts is None


def test_state_round_trip(build, family, samples):
    def grown():
        mllm = build(family).add_experts(2, rank=2, alpha=8, projector_experts=True, router="softmax", dropout=0.0)
        return mllm

    one, two = grown(), grown()
    fill_experts(one)
    ids = [0, 1, -1, 0] * 2
    state = {name: value.clone() for name, value in one.trainable_state().items()}
    two.load_trainable_state(state)
    assert torch.equal(logits(one, samples, ids), logits(two, samples, ids))
    for name, value in two.trainable_state().items():
        assert torch.equal(value, state[name])


def test_a_state_that_does_not_fit_is_named(build):
    mllm = build("composed").add_experts(1, rank=2, alpha=4)
    state = dict(mllm.trainable_state())
    name = next(iter(state))
    with pytest.raises(ValueError, match=f"1 missing .{name}"):
        mllm.load_trainable_state({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match=r"1 left over \(stranger\)"):
        mllm.load_trainable_state({**state, "stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 of another shape .*expected \[2, 32\], got \[3\]"):
        mllm.load_trainable_state({**state, name: torch.zeros(3)})


# -- the rest


@pytest.mark.parametrize(
    ("gates", "error", "message"),
    [
        ("on", ValueError, "gates: expected None"),
        ([0, 2], ValueError, r"ids in -1\.\.1, got 2"),
        ([-2, 0], ValueError, r"ids in -1\.\.1, got -2"),
        (torch.rand(3), ValueError, r"floats \[E\], \[B, E\] or \[B, G, E\] with E = 2"),
        (torch.ones(2, 2, dtype=torch.bool), TypeError, "floats or integer ids"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"ids of shape \[B\]"),
    ],
)
def test_wrong_gates_are_named(build, gates, error, message):
    mllm = build("composed").add_experts(2, rank=2, alpha=4)
    with pytest.raises(error, match=message), mllm.use_experts(gates):
        pass


def test_without_experts_only_the_base_can_be_asked_for(build):
    mllm = build("composed")
    with mllm.use_experts("off"), mllm.use_experts(None):
        pass
    with pytest.raises(ValueError, match="there are no experts"), mllm.use_experts([0]):
        pass
    with pytest.raises(ValueError, match="call add_experts first"):
        mllm.grow_experts(1)
    mllm.add_experts(1, rank=2, alpha=4)
    with pytest.raises(ValueError, match="there are 1 experts already"):
        mllm.add_experts(1, rank=2, alpha=4)


def test_describe_counts_and_names(build):
    mllm = build("composed").add_experts(2, rank=2, alpha=4, targets=["q_proj"])
    text = mllm.describe()
    trains = sum(p.numel() for p in mllm.model.parameters() if p.requires_grad)
    assert f"{trains:,} of" in text and "expert layers (2)" in text
    assert all(path in text for path in mllm.expert_layers)


def test_bfloat16_base_keeps_float32_experts(folders):
    mllm = MLLM.from_pretrained(folders / "llava", dtype=torch.bfloat16)
    mllm.add_experts(2, rank=2, alpha=4, projector_experts=True)
    assert {value.dtype for name, value in mllm.trainable_state().items() if "lora" in name} == {torch.float32}
    mllm.set_trainable(projector=True)
    samples = make_samples("llava")
    with mllm.use_experts([0, 1] * 4):
        loss = mllm.loss(mllm.collate(samples, with_answers=True))
    loss.backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    assert len(mllm.generate(samples, [0, 1] * 4, max_new_tokens=3)) == 8
