"""Several processes that learn one run together: data parallel training over torch.distributed.

    torchrun --nproc-per-node 2 -m mllmcl run CONFIG.yaml

Each process has the whole model and its share of every batch. What it has of a gradient is added up once, after the
last backward pass of a step, by an explicit all-reduce: which parameters train changes at every boundary, and methods
read and change gradients between backward pass and step. From there on every process does the same with the same
numbers, so parameters stay bit-equal; `check_alike` looks at that after every phase. The first process writes files,
which all of them have to see.

What a method computes over a training set at a boundary, and what routers choose, every process computes alike; the
batches of an evaluation are shared out whole, so answers are those of one process. `shard_base` cuts the frozen
weights of decoder layers up with FSDP2, for a base that fits no single device.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..processes import Processes
from .rng import derive_seed

if TYPE_CHECKING:
    from ..models import MLLM

__all__ = ["Alone", "Several", "joined"]

#: of gradients that are added up in one go
BUCKET_BYTES = 32 << 20
#: what torchrun says to each process
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Alone(Processes):
    """What the loop asks of the processes of a run, where there is one."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def begin_step(self, step: int) -> None:
        """From here on `own_draws` draws for this optimizer step of the run."""

    def add_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
        """Add up gradients and loss over the processes; a parameter without gradient in all of them keeps none."""

    def broadcast(self, value: Any) -> Any:
        """What the first process has; a value that JSON holds."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""

    def check_same(self, value: dict, what: str) -> None:
        """Raise ValueError with the first difference unless all processes have the same."""

    def different(self, tensors: dict[str, Tensor]) -> list[str]:
        """Names of tensors that are not bit-equal in all processes."""
        return []

    def check_alike(self, tensors: dict[str, Tensor], when: str) -> None:
        """Raise RuntimeError with names unless these are bit-equal in all processes."""

    def spread(self, tensors: dict[str, Tensor]) -> None:
        """Copy the first process's tensors into those of the others."""

    def shard_base(self, mllm: MLLM) -> None:
        """Leave this process a part of each decoder layer's frozen weights."""


@contextlib.contextmanager
def joined(seed: int, device: torch.device) -> Iterator[Alone]:
    """The processes of this run: those that torchrun started, or of the process group that is there; else one.

    Args:
        seed: of the run. device: of this process's model.

    Raises:
        ValueError: torchrun's environment is not whole, or two processes have their model on one GPU.
    """
    if not dist.is_available() or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield Alone()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        missing = [name for name in ENVIRONMENT if name not in os.environ]
        if missing:
            raise ValueError(
                f"train: WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; several "
                "processes are started by torchrun"
            )
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        # a second run in these processes joins the same group, so it stays until they end
        atexit.register(_leave)
    if dist.get_world_size() == 1:
        yield Alone()
        return
    try:
        yield Several(seed, device)
    except BaseException:
        # the others must not wait for this process, whatever its caller does with the error; on GPUs leaving would wait
        # for them, and it is the end of this process that torchrun sees
        atexit.unregister(_leave)
        if device.type == "cpu":
            _leave()
        raise


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"process {os.environ.get('RANK', '')} hears nothing from the others any more; one of them has ended, and "
            f"its own error says why ({str(error).splitlines()[0][:200]})"
        ) from error


class Several(Alone):
    """The processes of torch's default group.

    Args:
        seed: of the run. device: of this process's model.
    """

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # what the host has to know does not wait for the device
        self.host = dist.new_group(backend="gloo")
        self.is_sharded = False
        self.token_share = 1.0
        self.step = self.num_draws = 0
        #: the state of the generator that all share, while this process draws from its own
        self.common: Tensor | None = None
        self._check_devices()

    def _check_devices(self) -> None:
        if self.device.type == "cuda":
            held = self.gather([os.uname().nodename, str(self.device)])
            double = next((place for place in held if held.count(place) > 1), None)
            if double is not None:
                raise ValueError(
                    f"train: expected one GPU for each process, got {double[1]} of {double[0]} more than once; load "
                    "the model on cuda:LOCAL_RANK"
                )

    # -- a batch

    def share(self, items):
        total, first, end = len(items), len(items) * self.rank // self.size, len(items) * (self.rank + 1) // self.size
        if total >= self.size:
            return items[first:end], 1.0
        # a process without a sample would leave the others waiting, so some have one together
        owners = [total * rank // self.size for rank in range(self.size)]
        return items[first : first + 1], 1.0 / owners.count(first)

    def weigh(self, batch_size, fraction, tokens):
        self.batch_size, self.fraction = batch_size, fraction
        self.token_share = self._share_of(fraction * tokens)
        return self.token_share

    def part(self, mean, weight):
        return mean * (self._share_of(weight) / self.token_share)

    def _share_of(self, weight: float | Tensor) -> float | Tensor:
        """What this process has of the sum over all."""
        on_host = not isinstance(weight, Tensor)
        total = torch.tensor(weight, dtype=torch.float64) if on_host else weight.detach().clone()
        self.add_([total])
        return weight / (float(total) if on_host else total)

    @torch.no_grad()
    def add_(self, tensors):
        for bucket in _buckets(tensors):
            is_one = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if is_one else torch.cat([tensor.reshape(-1) for tensor in bucket])
            with _talking():
                dist.all_reduce(flat, group=self.host if flat.device.type == "cpu" else None)
            if not is_one:
                parts = flat.split([tensor.numel() for tensor in bucket])
                torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])

    def add_gradients(self, parameters, loss):
        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        with _talking():
            dist.all_reduce(has, op=dist.ReduceOp.MAX, group=self.host)
        grads = []
        for parameter, some in zip(parameters, has.tolist(), strict=True):
            if some:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        self.add_([loss, *grads])

    def batches_of(self, batches):
        # a layer of a sharded base is gathered by all processes together, so they have to do the same passes
        return batches if self.is_sharded else batches[self.rank :: self.size]

    def shard_base(self, mllm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        tower = mllm.model.get_submodule(mllm.language_path)
        layers = next((list(module) for module in tower.modules() if isinstance(module, nn.ModuleList)), None)
        if not layers:
            raise ValueError(f"shard_base: {type(tower).__name__} has no list of decoder layers")
        mesh = init_device_mesh(self.device.type, (self.size,))
        may_train = mllm.trainable_state().keys()
        whole = {value for name, value in mllm.model.named_parameters() if name in may_train}
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        within = {value for layer in layers for value in layer.parameters()}
        # the root that the layers belong to, with nothing of its own to shard
        fully_shard(tower, mesh=mesh, ignored_params=whole | ({*tower.parameters()} - within))
        self.is_sharded = True

    # -- draws

    def begin_step(self, step):
        self.step, self.num_draws = step, 0

    @contextlib.contextmanager
    def own_draws(self):
        is_cuda = self.device.type == "cuda"
        on_device = torch.cuda.get_rng_state(self.device) if is_cuda else None
        self.common = torch.get_rng_state()
        # a function of where the run stands, so that there is nothing to save
        self.num_draws += 1
        own = derive_seed(self.seed, "process", self.rank, self.step, self.num_draws)
        torch.default_generator.manual_seed(own)
        if is_cuda:
            torch.cuda.manual_seed(own)
        try:
            yield
        finally:
            torch.set_rng_state(self.common)
            self.common = None
            if is_cuda:
                torch.cuda.set_rng_state(on_device, self.device)

    @contextlib.contextmanager
    def alike_draws(self):
        if self.common is None:
            yield
            return
        own = torch.get_rng_state()
        torch.set_rng_state(self.common)
        try:
            yield
        finally:
            self.common = torch.get_rng_state()
            torch.set_rng_state(own)

    # -- values and tensors

    def gather(self, value):
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        self.add_([sizes])
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty_like(padded) for _ in range(self.size)]
        with _talking():
            dist.all_gather(found, padded, group=self.host)
        return [json.loads(bytes(one[:size].numpy())) for one, size in zip(found, sizes.tolist(), strict=True)]

    def broadcast(self, value):
        return self.gather(value if self.is_first else None)[0]

    def of_first(self, tensor):
        found = tensor.detach().clone().contiguous()
        self.spread({"": found})
        return found

    def wait(self):
        with _talking():
            dist.barrier(group=self.host)

    def check_same(self, value, what):
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                where = _first_difference(values[0], other)
                raise ValueError(f"train: expected the same {what} in every process, got {where} (0 and {rank})")

    def different(self, tensors):
        held = self.gather({name: _digest(tensor) for name, tensor in tensors.items()})
        return sorted(name for name in set().union(*held) if len({one.get(name) for one in held}) > 1)

    def check_alike(self, tensors, when):
        different = self.different(tensors)
        if different:
            raise RuntimeError(
                f"{len(different)} tensors are not the same in every process {when}, e.g. {', '.join(different[:3])}"
            )

    @torch.no_grad()
    def spread(self, tensors):
        for tensor in tensors.values():
            flat = tensor if tensor.is_contiguous() else tensor.contiguous()
            with _talking():
                dist.broadcast(flat, 0, group=self.host if flat.device.type == "cpu" else None)
            if flat is not tensor:
                tensor.copy_(flat)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of one kind, each of a bearable size; in the same order in every process."""
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for alike in kinds.values():
        bucket, size = [], 0
        for tensor in alike:
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _digest(tensor: Tensor) -> str:
    """Of shape, dtype and every bit."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    facts = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.blake2b(data, digest_size=16, salt=hashlib.blake2b(facts, digest_size=16).digest()).hexdigest()


def _first_difference(one: Any, other: Any, name: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *other]:
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        place = next(place for place, (ours, theirs) in enumerate(zip(one, other, strict=True)) if ours != theirs)
        return _first_difference(one[place], other[place], f"{name}.{place}".lstrip("."))
    return f"{name} {one!r} and {other!r}"
