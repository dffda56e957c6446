"""torch.compile: ops and expert layers trace whole, equal eager, and no choice of experts compiles anew."""

# B samples, S positions, K in, N out, E experts

import contextlib
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from mllmcl.models import ExpertLinear, ExpertProjectorLinear, ExpertState
from mllmcl.models.experts import select, with_batch
from mllmcl_kernels import (
    Mask,
    anchor_grad_,
    ema_update_,
    importance_update_,
    lora_mix,
    lora_mix_routed,
    mask_grads_,
    masked_adamw_,
    orthogonality_loss,
    project_grads_,
    route,
    sampled_product_l1,
)

from ..models.tiny import fill_experts, make_composed, make_samples

B, S, K, N, RANKS = 4, 5, 12, 10, (2, 3, 4)
E = len(RANKS)
NUM_CALLS = 6


@pytest.fixture(autouse=True)
def fresh_graphs():
    """No graph of another test, and none left for it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function):
    """`function` in one graph, forward and backward traced, and the counter of compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True), counter


def test_a_compiler_after_a_plain_call_in_a_fresh_process():
    """What C++ registers is declared by then, whatever the process has imported."""
    code = (
        "import torch; from mllmcl_kernels import lora_mix; x = torch.ones(2, 2, requires_grad=True);"
        "y = [run(x).sum() for mix in [lambda x: lora_mix(x, x, None, x, x)]"
        " for run in (mix, torch.compile(mix, backend='aot_eager', fullgraph=True))];"
        "y[1].backward(); print(y[0].item(), y[1].item(), x.grad.sum().item())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    # x x^T + (x x^T) x^T is 6 everywhere; a sum of products of two and of three ones has 2 and 3 times their number
    assert child.stdout.split() == ["24.0", "24.0", "64.0"]


class Mixed(nn.Module):
    """A linear with experts, of the bare ops; `way` says which."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.base = nn.Linear(K, N)
        self.a, self.b = nn.Parameter(torch.randn(9, K)), nn.Parameter(torch.randn(N, 9))
        self.router = nn.Parameter(torch.randn(E, K))

    def forward(self, x, gates):
        layer = (x, self.base.weight, self.base.bias, self.a, self.b)
        options = {"ranks": RANKS, "scaling": (1.0, 0.5, 2.0), "trainable": (True, False, True)}
        if self.way == "lora_mix":
            return lora_mix(*layer, gates, **options)
        if self.way == "route":
            routing = route(x, self.router, top_k=2, renormalize=True)
            return lora_mix(*layer, routing.gates, **options) + routing.balance_loss() + routing.z_loss()
        y, routing = lora_mix_routed(*layer, self.router, top_k=1, token_mask=gates, **options)
        return y + routing.balance_loss() + routing.entropy()


def run(step, module, x, *rest):
    """The output and every gradient of one step, zeros where there is none."""
    module.zero_grad()
    torch.manual_seed(0)
    x = x.double().requires_grad_()
    y = step(x, *rest)
    y.square().sum().backward()
    leaves = [x, *module.parameters()]
    return [y.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves)]


def check_calls(module, calls, num_graphs=1, around=contextlib.nullcontext):
    """Compiled equals eager on every call `(x, ...)` of `calls`, from `num_graphs` compilations in all."""
    step, counter = compiled(module.double())
    for number, (x, *rest) in enumerate(calls):
        with around(number):
            expected = run(module, module, x, *rest)
            found = run(step, module, x, *rest)
        assert expected[1].abs().max() > 0
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == num_graphs


GATES = {
    "no gates": lambda: None,
    "floats of the batch": lambda: torch.rand(E),
    "floats of samples": lambda: torch.rand(B, 1, E),
    "floats of tokens": lambda: torch.rand(B, S, E),
    "ids of samples": lambda: torch.randint(-1, E, (B, 1)),
    "ids of tokens": lambda: torch.randint(-1, E, (B, S)),
}


@pytest.mark.parametrize("kind", GATES)
def test_lora_mix(kind):
    check_calls(Mixed("lora_mix"), [(torch.randn(B, S, K), GATES[kind]()) for _ in range(NUM_CALLS)])


@pytest.mark.parametrize("way", ["route", "lora_mix_routed"])
def test_routers(way):
    masks = [None] * NUM_CALLS if way == "route" else [torch.rand(B, S) < 0.7 for _ in range(NUM_CALLS)]
    check_calls(Mixed(way), [(torch.randn(B, S, K), mask) for mask in masks])


def losses_of(routing):
    return routing.balance_loss() + routing.z_loss() + routing.importance.square().sum()


def test_losses_of_a_router_are_one_small_op_forward_and_one_backward():
    """The router itself leaves the sums, and takes their gradient."""
    ops = []

    def note(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if "routing_" in str(node.target))
        return make_boxed_func(graph)

    torch.manual_seed(0)
    x, router = torch.randn(B, S, K), torch.randn(E, K, requires_grad=True)
    run = torch.compile(
        lambda x, router: losses_of(route(x, router, top_k=2)), backend=aot_autograd(fw_compiler=note), fullgraph=True
    )
    ours = torch.autograd.grad(run(x, router), router)
    torch.testing.assert_close(ours, torch.autograd.grad(losses_of(route(x, router, top_k=2)), router))
    assert ops == ["mllmcl.routing_statistics.default", "mllmcl.routing_statistics_backward.default"]


@pytest.mark.parametrize("made", ["in a graph", "outside"])
@pytest.mark.parametrize("is_asked", [False, True])
def test_a_routing_leaves_a_graph_and_enters_one(made: str, is_asked: bool):
    """Asked for its load where it was made, or not."""
    torch.manual_seed(0)
    x, router = torch.randn(B, S, K), torch.randn(E, K, requires_grad=True)

    def make(x, router):
        routing = route(x, router, top_k=2)
        return (routing, routing.load) if is_asked else (routing, None)

    make_compiled, _ = compiled(make)
    losses_compiled, _ = compiled(losses_of)
    run = (make_compiled, losses_of) if made == "in a graph" else (make, losses_compiled)
    outcomes = []
    for maker, losses in ((make, losses_of), run):
        routing, load = maker(x, router)
        assert load is None or load.sum() == 2 * B * S
        total = losses(routing)
        outcomes.append((total, routing.entropy(), *torch.autograd.grad(total, router)))
    torch.testing.assert_close(*outcomes)


def expert_layer(**options):
    state = ExpertState(ranks=RANKS, scaling=(1.0, 0.5, 2.0), trainable=(True, False, True), **options)
    layer = ExpertLinear(nn.Linear(K, N).requires_grad_(False), state, "layer")
    nn.init.normal_(layer.lora_b)
    return layer


def check_layer_calls(layer, choices, num_graphs=1):
    """As `check_calls`, each call under `use_experts` of one of `choices`."""
    state = layer.state
    selections = [with_batch(select(state, gates, torch.device("cpu")), None, range(B), ()) for gates in choices]
    calls = [(torch.randn(B, S, K),) for _ in choices]
    check_calls(layer, calls, num_graphs, lambda number: state.using(selections[number]))


CHOICES = {
    "nothing": lambda: None,
    "floats of the batch": lambda: torch.rand(E),
    "floats of samples": lambda: torch.rand(B, E),
    "ids": lambda: torch.cat((torch.tensor([-1, 2]), torch.randint(-1, E, (B - 2,)))),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_expert_layer(kind):
    check_layer_calls(expert_layer(), [CHOICES[kind]() for _ in range(NUM_CALLS)])


@pytest.mark.parametrize("top_k", [None, 1])
def test_expert_layer_with_a_learned_router(top_k):
    layer = expert_layer(router="softmax", router_top_k=top_k)
    check_layer_calls(layer, [None] * NUM_CALLS)


def test_expert_layer_with_dropout_draws_a_mask_in_each_call():
    layer = expert_layer(dropout=0.5)
    check_layer_calls(layer, [torch.rand(B, E) for _ in range(NUM_CALLS)])
    step, _ = compiled(layer)
    x = torch.randn(B, S, K, dtype=torch.float64)
    assert not torch.equal(step(x), step(x))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_expert_layer_with_a_share_of_its_router(share):
    layer = expert_layer(router="softmax", router_share=share)
    check_layer_calls(layer, [torch.rand(B, E) for _ in range(NUM_CALLS)])


def test_ids_of_one_expert_known_on_the_host_need_no_graph_of_their_own():
    """Eager takes the rows of that expert alone; a graph takes ids as data, also -1 for the whole batch."""
    choices = [[expert] * B for expert in (0, 1, 2, -1)] + [[0, 2, -1, 1]]
    assert [select(expert_layer().state, ids, torch.device("cpu")).uniform for ids in choices] == [0, 1, 2, -1, None]
    check_layer_calls(expert_layer(), choices)


def test_no_experts_at_all_is_one_graph_more():
    check_layer_calls(expert_layer(), [[0, 1, 2, 0], "off", [2] * B, "off"], num_graphs=2)


def test_groups_of_layers():
    """Rows of gates for each group, of which those alone in their group need no graph of their own either."""
    layer = expert_layer(groups={"layer": 1, "other": 0})
    alone = torch.eye(E)[[0, 2]].expand(B, 2, E)
    check_layer_calls(layer, [torch.rand(B, 2, E), alone, alone.flip(1), torch.rand(B, 2, E)])


def test_projector_copies_known_on_the_host_have_a_graph_each():
    """Ids of mixed batches are data; an expert that is alone in its batch costs a graph, once."""
    state = ExpertState(ranks=RANKS, scaling=(1.0,) * E, trainable=(True, False, True))
    layer = ExpertProjectorLinear(nn.Linear(K, N), state, "projector")
    nn.init.normal_(layer.expert_weight)
    mixed = [torch.cat((torch.tensor([-1, 2]), torch.randint(-1, E, (B - 2,)))) for _ in range(3)]
    check_layer_calls(layer, mixed)
    check_layer_calls(layer, [*mixed, [0] * B, [2] * B, [0] * B, [2] * B, *mixed], num_graphs=3)


def test_decoder_layers_of_a_model():
    """Each of 2 layers is one graph for all ids and one for all floats; losses and gradients are those of eager."""
    choices = [[0] * 8, [1] * 8, [0, 1, 2, -1] * 2, [2, 1, 0, 0] * 2, torch.rand(8, 3), torch.rand(8, 3)]
    counter = CompileCounterWithBackend("aot_eager")
    outcomes = []
    for is_compiled in (False, True):
        mllm = make_composed().add_experts(3, rank=[2, 3, 4], alpha=8, dropout=0.0)
        fill_experts(mllm)
        mllm.train()
        for layer in mllm.model.get_submodule(mllm.language_path).layers:
            if is_compiled:
                layer.compile(backend=counter, fullgraph=True)
        for gates in choices:
            with mllm.use_experts(gates):
                loss = mllm.loss(mllm.collate(make_samples("composed"), with_answers=True))
            loss.backward()
            outcomes.append(loss.detach())
        outcomes += [parameter.grad for parameter in mllm.model.parameters() if parameter.requires_grad]
    half = len(outcomes) // 2
    assert half == len(choices) + 2 * 2 * 7
    for eager, ours in zip(outcomes[:half], outcomes[half:], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2 * 2


LISTS = {
    "mask_grads_": lambda one, two, masks: mask_grads_(one, masks),
    "anchor_grad_": lambda one, two, masks: anchor_grad_(one, two, [t * 2 for t in two], two, 0.5, masks=masks),
    "project_grads_": lambda one, two, masks: project_grads_(one, [torch.eye(6)[:, :2], None]),
    "ema_update_": lambda one, two, masks: ema_update_(one, two, decay=0.9, masks=masks),
    "importance_update_": lambda one, two, masks: importance_update_(one, two, count=2, masks=masks),
    "masked_adamw_": lambda one, two, masks: masked_adamw_(
        one, two, [t * 0 for t in two], [t * 0 for t in two], masks, step=1, lr=0.1
    ),
    "orthogonality_loss": lambda one, two, masks: orthogonality_loss(one, two),
    "sampled_product_l1": lambda one, two, masks: sampled_product_l1(
        one, [t.t() for t in two], *[[torch.tensor([0, 3]), torch.tensor([1, 1])]] * 2
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_functions_over_lists(name):
    """One graph; in place or with a loss and gradients, as in eager."""
    run, counter = compiled(LISTS[name])
    masks = [Mask.experts([True, False], ranks=(2, 2), dim=0), None]
    outcomes = []
    for function in (LISTS[name], run):
        torch.manual_seed(0)
        one, two = ([torch.rand(4, 6), torch.rand(5, 6)] for _ in range(2))
        if not name.endswith("_"):
            one = [tensor.requires_grad_() for tensor in one]
        before = [tensor.detach().clone() for tensor in one]
        loss = function(one, two, masks)
        if loss is not None:
            loss.backward()
        found = [tensor.detach() for tensor in one] if loss is None else [tensor.grad for tensor in one]
        assert not torch.equal(found[0], before[0])
        outcomes.append(found)
    assert counter.frame_count == 1
    for eager, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, eager)


NUMBERS = {
    "lora_mix": lambda x, w, number: lora_mix(x, w, None, x[:4], w[:, :4], dropout=number),
    "route": lambda x, w, number: route(x, w, temperature=number).gates,
    "lora_mix_routed": lambda x, w, number: lora_mix_routed(x, w, None, x[:4], w[:, :4], x[:2], temperature=number)[0],
    "ema_update_": lambda x, w, number: ema_update_([x], [x * 2], decay=number),
    "masked_adamw_": lambda x, w, number: masked_adamw_(
        [x], [x * 2], [x * 0], [x * 0], None, step=3 + number, lr=number
    ),
    "anchor_grad_": lambda x, w, number: anchor_grad_([x], [x * 2], [x * 3], [x * 0 + 1], number),
    "importance_update_": lambda x, w, number: importance_update_([x], [x * 2], count=3 + number),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes(name: str, dynamic: bool | None):
    """An annealed option traces whole, and counts as it is at the call."""
    run = torch.compile(NUMBERS[name], backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for number in (0.3, 0.4, 0.5):
        outcomes = []
        for function in (NUMBERS[name], run):
            torch.manual_seed(0)
            x, w = torch.rand(6, 8), torch.rand(5, 8)
            result = function(x, w, number)
            outcomes.append(x if result is None else result)
        torch.testing.assert_close(*outcomes)


def test_an_id_out_of_range_raises_in_a_graph_too():
    run, _ = compiled(
        lambda ids: lora_mix(
            torch.ones(2, K), torch.ones(N, K), None, torch.ones(9, K), torch.ones(N, 9), ids, ranks=RANKS
        )
    )
    run(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"lora_mix: gates must be ids in -1\.\.2, got 3 at position 1"):
        run(torch.tensor([0, 3]))


def test_one_layer_whose_columns_are_a_view():
    """The gradient lies as the compiler was told."""
    run = torch.compile(
        lambda a, b: sampled_product_l1(a, b, torch.tensor([0, 1]), torch.tensor([0, 7])), fullgraph=True
    )
    torch.manual_seed(0)
    a, b = torch.randn(6, 8, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    ours = torch.autograd.grad(run(a, b), (a, b))
    torch.testing.assert_close(
        ours, torch.autograd.grad(sampled_product_l1(a, b, torch.tensor([0, 1]), torch.tensor([0, 7])), (a, b))
    )
