"""One declaration object per op: schema, reference, fake, autograd, providers, samples, cost.

An `Op` is built once, in `ops/<op>/__init__.py`. Building it registers `mllmcl::<name>` with `torch.library` and puts
it into `REGISTRY`; tests, benchmarks and `python -m mllmcl_kernels.info` walk that registry. A faster path is one more
file in the op's folder, named after its backend (`cpp.py`, `triton.py`, `cuda.py`), that calls `op.provider(...)`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.library import Library, infer_schema

from . import library

__all__ = ["REGISTRY", "BadSample", "Cost", "Op", "Prepared", "Provider", "Sample"]

log = logging.getLogger("mllmcl_kernels")

NAMESPACE = "mllmcl"
LIBRARY = Library(NAMESPACE, "DEF")
REGISTRY: dict[str, Op] = {}

#: providers tried in this order when the caller names none
PRIORITY = {"cpu": ("cpp", "chunked", "reference"), "cuda": ("cuda", "triton", "chunked", "reference")}
#: types of tensors without a way of their own to run operators
PLAIN = frozenset({Tensor, torch.nn.Parameter})
REQUIRES_GRAD = operator.attrgetter("requires_grad")
#: device types of the tensors that a backend takes
DEVICES = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu")}


@dataclass(frozen=True)
class Sample:
    """Positional arguments of one legal call of an op, and what it is an example of."""

    name: str
    args: tuple


@dataclass(frozen=True)
class BadSample:
    """A call of the public function that has to raise, and a regular expression its message has to match."""

    name: str
    call: Callable[[], object]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Cost:
    """Work of one call at the limit of the hardware: every input read once, every output written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Provider:
    """One implementation.

    `run` has the reference's signature; `supports` says why arguments do not fit, or None. `prepare`, where there is
    one, takes the arguments of a call and returns what makes it again (`Prepared`). `at_once`, where there is one,
    looks at lists and works on them in one go (`Op.at_once`).
    """

    backend: str
    run: Callable
    supports: Callable[..., str | None]
    prepare: Callable[..., Callable[..., bool]] | None = None
    at_once: Callable[..., bool] | None = None


@dataclass(frozen=True)
class Prepared:
    """A call of an op that writes into lists of tensors, ready to be made again without looking at them one by one."""

    run: Callable[..., bool]
    written: Sequence[Sequence[Tensor]]
    default: str | None

    def __call__(self, read: Sequence[Sequence[Tensor]], *rest) -> bool:
        """Make the call with what it reads and the rest of its arguments as they are now, where the provider can.

        False, with nothing done: the op has to be called. Numbers may be plain ones.
        """
        if _is_watched() or library.default_backend() != self.default:
            return False
        if not PLAIN.issuperset(map(type, itertools.chain(*read))) or not self.run(read, *rest):
            return False
        for tensors in self.written:
            _count_change(tensors)
        return True


def _device_of(args: Iterable) -> str:
    """The device type of the first tensor, cpu without any."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0].device.type
    return "cpu"


def _anything(*_args) -> None:
    return None


def _count_change(changed: Tensor | Sequence[Tensor]) -> None:
    """Let autograd know of a change in place, so that a graph that holds the old values refuses to run."""
    tensors = [changed] if isinstance(changed, Tensor) else changed
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        # inference tensors have no version; counting the others twice does no harm
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def _in_a_row(args: Sequence, lengths: dict[int, int]) -> list:
    """The arguments, with those that are lists laid out one tensor after the other."""
    row: list = []
    for place, arg in enumerate(args):
        if place in lengths:
            row += arg
        else:
            row.append(arg)
    return row


def _in_lists(row: Sequence, lengths: dict[int, int]) -> list:
    """The inverse of `_in_a_row`."""
    args, at, place = [], 0, 0
    while at < len(row):
        length = lengths.get(place)
        args.append(row[at] if length is None else list(row[at : at + length]))
        at, place = at + (1 if length is None else length), place + 1
    return args


def _is_watched() -> bool:
    """Whether a compiler, tracer, transform, mode or profiler wants to see operators."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _without_autocast() -> contextlib.AbstractContextManager:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    return torch._C._ExcludeDispatchKeyGuard(keys | torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA))


@dataclass(eq=False)
class Op:
    """An operation `mllmcl::<name>`.

    reference      plain PyTorch, runs in float64; its annotated signature is the schema
    fake           shapes and dtypes of the outputs from the inputs', no data
    samples        (device, dtype, seed) -> legal calls, for tests and opcheck
    bad_samples    () -> calls of the public function that must raise
    cost           (*args) -> Cost, for the roofline
    examine        (*args), raises for values that only a run can see, in a compiled graph as well; not for kernels of a
                   device, which raise in their own way
    setup_context, backward     the autograd formula; `backward` usually calls another Op. An op that returns a list of
                   tensors is given the list of their gradients. The gradient of a list is a list as long
    mutates        names of arguments written in place
    autocast       names of tensor arguments, lists too, cast to the autocast dtype (the rest stays as it came)
    constants      names of floating tensor arguments that get no gradient
    aside          places of the floating outputs that pass no gradient on, such as what only the backward reads
    tolerance      factor of the error rule where it has to differ from 2, with `tolerance_reason` in words
    """

    name: str
    reference: Callable
    package: str
    fake: Callable
    samples: Callable[[torch.device, torch.dtype, int], list[Sample]]
    bad_samples: Callable[[], list[BadSample]] = list
    cost: Callable[..., Cost] | None = None
    examine: Callable[..., None] | None = None
    setup_context: Callable | None = None
    backward: Callable | None = None
    mutates: Sequence[str] = ()
    autocast: Sequence[str] = ()
    constants: Sequence[str] = ()
    aside: Sequence[int] = ()
    tolerance: float = 2.0
    tolerance_reason: str = ""
    providers: dict[str, Provider] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.name not in REGISTRY, self.name
        self.provider("reference")(self.reference)
        schema = infer_schema(self.reference, mutates_args=set(self.mutates))
        head, arrow, tail = schema.rpartition(") ->")
        self.schema = f"{self.name}{head}, *, str? backend=None{arrow}{tail}"
        LIBRARY.define(self.schema)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(self.name, self._run, key)
        qualified = f"{NAMESPACE}::{self.name}"
        torch.library.register_fake(qualified, lambda *args, backend=None: self.fake(*args), lib=LIBRARY)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        arguments = [argument for argument in self.overload._schema.arguments if not argument.kwarg_only]
        self.argument_names = [argument.name for argument in arguments]
        kinds = [str(argument.type) for argument in arguments]
        self.tensor_places = [place for place, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
        self.list_places = [place for place, kind in enumerate(kinds) if kind.startswith("List") and "Tensor" in kind]
        self.mutated_places = [self.argument_names.index(name) for name in self.mutates]
        self.returns_list = [str(result.type) for result in self.overload._schema.returns] == ["List[Tensor]"]
        self.constant_places = {self.argument_names.index(name) for name in self.constants} & set(self.list_places)
        if self.backward is not None:
            torch.library.register_autograd(qualified, self.backward, setup_context=self._setup_context, lib=LIBRARY)
        elif not self.mutates:
            torch.library.register_autograd(qualified, self._refuse_backward, lib=LIBRARY)
        if self.autocast:
            for device in ("cpu", "cuda"):
                LIBRARY.impl(self.name, functools.partial(self._run_autocast, device), f"Autocast{device.upper()}")
        REGISTRY[self.name] = self

    # -- calling ------------------------------------------------------------------------------------------------------

    def __call__(self, *args, backend: str | None = None):
        """Run the op: plain tensors at once, which saves tens of microseconds, all else through the dispatcher."""
        if _is_watched():
            return self.overload(*args, backend=backend)
        lengths = {place: len(args[place]) for place in self.list_places if args[place]} or None
        tensors = [arg for place in self.tensor_places if (arg := args[place]) is not None]
        if lengths is not None:
            tensors = [*itertools.chain.from_iterable(args[place] for place in lengths), *tensors]
        device = tensors[0].device.type if tensors else "cpu"
        if device not in PRIORITY or not PLAIN.issuperset(map(type, tensors)):
            return self.overload(*args, backend=backend)
        wants_grad = not self.mutates and torch.is_grad_enabled() and any(map(REQUIRES_GRAD, tensors))
        if wants_grad and self.backward is None:
            return self.overload(*args, backend=backend)
        if not torch.is_autocast_enabled(device):
            return self._apply(args, lengths, backend) if wants_grad else self._run(*args, backend=backend)
        args = self._cast(device, args)
        with _without_autocast():
            return self._apply(args, lengths, backend) if wants_grad else self._run(*args, backend=backend)

    def first_asked(self, backend: str | None) -> str:
        """The backend that comes first on a CPU: the one asked for, else that of the environment, else the fastest."""
        return backend if backend is not None else library.default_backend() or PRIORITY["cpu"][0]

    def at_once(self, lists: Sequence[Sequence[Tensor]], *rest, backend: str | None = None) -> bool:
        """Make the call with lists that nobody has looked at, the first written into, where all is as it mostly is.

        The rest is what the provider's `at_once` takes. False, with nothing done: the arguments have to be checked, in
        words, and the op called.
        """
        if _is_watched() or not all(isinstance(tensors, (list, tuple)) for tensors in lists):
            return False
        name = self.first_asked(backend)
        provider = self.find(name) if name in library.BACKENDS else None
        if not isinstance(provider, Provider) or provider.at_once is None or _device_of(lists) != "cpu":
            return False
        if not PLAIN.issuperset(map(type, itertools.chain(*lists))) or not provider.at_once(lists, *rest):
            return False
        _count_change(lists[0])
        return True

    def prepare(self, *args) -> Prepared | None:
        """What makes this call again in less time, None where nothing does; for ops that write into lists."""
        tensors = itertools.chain.from_iterable(args[place] for place in self.list_places)
        if _is_watched() or not PLAIN.issuperset(map(type, tensors)):
            return None
        provider = self.choose(args, None)
        if provider.prepare is None:
            return None
        written = [args[place] for place in self.mutated_places]
        return Prepared(provider.prepare(*args), written, library.default_backend())

    def _apply(self, args: Sequence, lengths: dict[int, int] | None, backend: str | None):
        """Run the op with its gradient; `lengths` are those of the arguments that are lists of tensors, by place."""
        if lengths is not None:
            # autograd looks at every tensor in the row, and those of a list that has no gradient may be hundreds
            lengths = {place: length for place, length in lengths.items() if place not in self.constant_places}
            args = _in_a_row(args, lengths)
        return self.function.apply(*args, lengths, backend)

    @functools.cached_property
    def function(self) -> type[torch.autograd.Function]:
        """The op with its gradient for plain tensors, lists laid out in a row; the lengths of lists and the backend
        come last."""
        op = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                *args, ctx.lengths, ctx.backend = args
                if ctx.lengths is not None:
                    args = _in_lists(args, ctx.lengths)
                output = op._run(*args, backend=ctx.backend)
                op.setup_context(ctx, args, output)
                return tuple(output) if op.returns_list else output

            @staticmethod
            def backward(ctx, *grads):
                given = (list(grads),) if op.returns_list else grads
                if ctx.lengths is None:
                    return (*op.backward(ctx, *given), None, None)
                flat = ctx.needs_input_grad
                try:
                    ctx.needs_input_grad = tuple(_in_lists(flat[:-2], ctx.lengths))
                    row = _in_a_row(op.backward(ctx, *given), ctx.lengths)
                finally:
                    ctx.needs_input_grad = flat
                # what is left as a list is an empty one, or one that gets no gradient
                return (*(None if isinstance(grad, list) else grad for grad in row), None, None)

        Function.__name__ = Function.__qualname__ = self.name
        return Function

    def _run(self, *args, backend: str | None = None):
        provider = self.choose(args, backend)
        if self.examine is not None and provider.backend != "triton":
            self.examine(*args)
        output = provider.run(*args)
        for place in self.mutated_places:
            _count_change(args[place])
        return output

    def _cast(self, device: str, args: Sequence) -> list:
        """The arguments that autocast casts, cast."""
        dtype = torch.get_autocast_dtype(device)

        def cast(arg: object) -> object:
            if isinstance(arg, (list, tuple)):
                return [cast(item) for item in arg]
            # float64 stays, as in torch's own operators
            floating = isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
            return arg.to(dtype) if floating else arg

        pairs = zip(self.argument_names, args, strict=False)
        return [cast(arg) if name in self.autocast else arg for name, arg in pairs]

    def _run_autocast(self, device: str, *args, backend: str | None = None):
        with _without_autocast():
            return self.overload(*self._cast(device, args), backend=backend)

    def _refuse_backward(self, ctx, *_grads):
        raise RuntimeError(f"{self.name} has no autograd formula: gradients of gradients are not supported")

    def _setup_context(self, ctx, inputs, keyword_only_inputs, output) -> None:
        ctx.backend = keyword_only_inputs.get("backend")
        self.setup_context(ctx, inputs, output)

    # -- providers ----------------------------------------------------------------------------------------------------

    def provider(
        self,
        backend: str,
        supports: Callable[..., str | None] = _anything,
        prepare: Callable | None = None,
        at_once: Callable | None = None,
    ) -> Callable:
        """Decorator that adds an implementation for `backend`."""
        assert backend in library.BACKENDS, backend

        def add(run: Callable) -> Callable:
            self.providers[backend] = Provider(backend, run, supports, prepare, at_once)
            return run

        return add

    @functools.cache  # noqa: B019 (ops live as long as the process)
    def find(self, backend: str) -> Provider | str:
        """The provider for `backend`, its file imported on first use, or the reason why there is none here."""
        reason = library.machine_reason(backend)
        if reason is not None:
            return reason
        if backend not in self.providers:
            module = f"{self.package}.{backend}"
            if importlib.util.find_spec(module) is None:
                return f"{self.name} has no {backend} implementation"
            importlib.import_module(module)
        return self.providers.get(backend) or f"{self.name} has no {backend} implementation"

    def reason_against(self, backend: str, args: Sequence, device: str | None = None) -> str | None:
        """None where `backend` can run this call, else why not; `device` saves looking for the arguments'."""
        provider = self.find(backend)
        if isinstance(provider, str):
            return provider
        device = device or _device_of(args)
        wants = DEVICES.get(backend, ("cpu", "cuda"))
        if device not in wants:
            return f"{backend} runs on {' or '.join(wants)} tensors, got {device}"
        if backend == "triton" and device == "cpu" and torch.cuda.is_available():
            return "triton runs on cuda tensors, got cpu"
        return provider.supports(*args)

    def choose(self, args: Sequence, backend: str | None) -> Provider:
        """The provider that runs this call: the one asked for, else the first of the device's priority that fits."""
        if backend is not None:
            if backend not in library.BACKENDS:
                raise ValueError(
                    f"{self.name}: backend must be one of {', '.join(library.BACKENDS)} or None, got {backend!r}"
                )
            reason = self.reason_against(backend, args)
            if reason is not None:
                raise ValueError(f"{self.name}: backend={backend!r} cannot run this call: {reason}")
            return self.find(backend)
        device = _device_of(args)
        order = PRIORITY[device]
        if (default := library.default_backend()) is not None:
            reason = library.machine_reason(default)
            if reason is not None:
                raise ValueError(f"{self.name}: MLLMCL_BACKEND={default!r} cannot run on this machine: {reason}")
            order = (default, *order)
        for name in order:
            reason = self.reason_against(name, args, device)
            if reason is None:
                return self.find(name)
            self._tell_once(name, reason)
        raise AssertionError(f"{self.name}: the reference runs everywhere")

    @functools.cache  # noqa: B019
    def _tell_once(self, backend: str, reason: str) -> None:
        log.info("%s does not use %s: %s", self.name, backend, reason)
