"""Expert layers that are given the same tensor, such as q, k and v of attention: the first one computes all.

Their A and routers become one pass over x, and the gradient of x is written once; see `mllmcl_kernels.lora_mix_shared`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from mllmcl_kernels import lora_mix_routed_shared, lora_mix_shared

from .experts import ExpertLinear, Selection

__all__ = ["SharedInput", "join", "part"]

log = logging.getLogger("mllmcl")

#: names of linears in one module that read the same tensor, in the order of their calls
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _version(tensor: Tensor | None) -> int:
    """How often the tensor was written to; tensors of inference mode do not count."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


class SharedInput:
    """Layers in the order of their calls. The outputs of the later ones wait until those are called with the same x.

    Where a layer is called with another tensor than the first one, the layers have nothing to share after all: from
    then on each computes its own output. Under torch.compile each does so too.
    """

    def __init__(self, layers: Iterable[ExpertLinear]):
        self.layers = tuple(layers)
        self._x: Tensor | None = None
        self._selection: Selection | None = None
        self._stamp: tuple = ()
        self._waiting: dict[str, Tensor] = {}

    def output_of(self, layer: ExpertLinear, x: Tensor) -> Tensor | None:
        """The layer's output for x, None where it has to compute that itself."""
        if torch.compiler.is_compiling() or not self.layers:
            return None
        stamp = self._stamp_of(x)
        waits = layer.path in self._waiting
        if waits and self._x is x and self._selection is layer.state.selection and self._stamp == stamp:
            found = self._waiting.pop(layer.path)
            if not self._waiting:
                self._forget()
            return found
        if waits and self._x is not x:
            log.info("%s is given another tensor than %s: each computes for itself", layer.path, self.layers[0].path)
            self.layers = ()
        self._forget()
        if not self.layers or layer is not self.layers[0]:
            return None
        outputs = self._outputs(x)
        if outputs is None:
            return None
        first, *rest = outputs
        self._x, self._selection, self._stamp = x, layer.state.selection, stamp
        self._waiting = {other.path: y for other, y in zip(self.layers[1:], rest, strict=True)}
        return first

    def _forget(self) -> None:
        self._x, self._selection, self._waiting = None, None, {}

    def _stamp_of(self, x: Tensor) -> tuple:
        """What must not change between the calls besides x and the selection."""
        first, kind = self.layers[0], x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        of_layers = [
            _version(tensor)
            for layer in self.layers
            for tensor in (layer.weight, layer.lora_a, layer.lora_b, layer.router_weight)
        ]
        return torch.is_grad_enabled(), first.training, first.state.collect, autocast, _version(x), *of_layers

    def _outputs(self, x: Tensor) -> list[Tensor] | None:
        """The outputs of all layers, None where different things act in them."""
        layers, first = self.layers, self.layers[0]
        selections, experts = zip(*(layer.selected() for layer in layers), strict=True)
        expert = experts[0]
        if len(set(experts)) > 1 or expert == -1:
            return None
        stacks = [list(kind) for kind in zip(*(layer.tensors(expert) for layer in layers), strict=True)]
        options = first.options(expert)
        if expert is not None:
            return lora_mix_shared(x, *stacks, **options)
        gates = [layer.gates_for(x, selection) for layer, selection in zip(layers, selections, strict=True)]
        is_open = [one is None for one in gates]
        routers = [layer.router_weight for layer in layers]
        if all(is_open) and routers[0] is not None:
            given = {**options, **first.routing_options(selections[0])}
            found, routings = lora_mix_routed_shared(x, *stacks, routers, **given)
            for layer, routing in zip(layers, routings, strict=True):
                layer.note(routing)
            return found
        if any(is_open):
            return lora_mix_shared(x, *stacks, **options) if all(is_open) else None
        return lora_mix_shared(x, *stacks, gates, **options)


def join(layers: dict[str, ExpertLinear]) -> None:
    """Let layers of one module that read the same tensor share it; `layers` by their path."""
    part(layers)
    parents: dict[str, dict[str, ExpertLinear]] = {}
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        parents.setdefault(parent, {})[name] = layer
    for named in parents.values():
        for names in SIBLINGS:
            siblings = [named[name] for name in names if name in named]
            if len(siblings) > 1 and len({layer.in_features for layer in siblings}) == 1:
                together = SharedInput(siblings)
                for layer in siblings:
                    layer.shared_input = together


def part(layers: dict[str, ExpertLinear]) -> None:
    """Let every layer compute its own output."""
    for layer in layers.values():
        layer.shared_input = None
