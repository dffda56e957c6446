"""The command line: `mllmcl run | report | methods | streams | doctor | export`, also as `python -m mllmcl`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .training.config import TrainConfig

__all__ = ["MethodConfig", "ModelConfig", "RunConfig", "StreamConfig", "main"]

# exit codes
USAGE, FAILED, INTERRUPTED, NOT_READ, TERMINATED = 2, 1, 130, 141, 143


@dataclass(kw_only=True)
class ModelConfig:
    """The model: either `pretrained`, or `vision` and `language` composed with a fresh projector.

    Attributes:
        pretrained: name or folder of an image-text-to-text model of transformers.
        vision: vision encoder of a composed model.
        language: language model of a composed model.
        projector: of a composed model.
        num_layers: keep only the first layers of the language model, for quick trials.
        image_size: of EfficientNet-Lite0, a multiple of 32; None takes its own.
        dtype: of the weights.
        device: "auto" takes a GPU where torch sees one.
        feature_cache: folder for frozen image features, None keeps them in memory.
        share_inputs: q, k and v, and gate and up, make one pass over their common input, with one dropout mask.
        threads: CPU threads of torch, None takes torch's own choice.
    """

    pretrained: str | None = None
    vision: str = "efficientnet-lite0"
    language: str = "smollm2-135m-instruct"
    projector: str = "mlp2x_gelu"
    num_layers: int | None = None
    image_size: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    feature_cache: str | None = None
    share_inputs: bool = False
    threads: int | None = None


@dataclass(kw_only=True)
class MethodConfig:
    """The method.

    Attributes:
        name: see `mllmcl methods`.
        options: its options, by name.
    """

    name: str = "mr_lora"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class StreamConfig:
    """The stream of tasks.

    Attributes:
        name: see `mllmcl streams`, or a folder of LLaVA-style JSON.
        root: where its files lie, for streams that need them.
        options: its options, by name.
    """

    name: str = "pocket-domain"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class RunConfig:
    """A run.

    Attributes:
        model: the model. method: the method. stream: the stream of tasks. train: how it is trained and evaluated.
        dry_run: check everything, then stop before weights are loaded.
    """

    train: TrainConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    dry_run: bool = False


def _parser(command: str, description: str):
    """A parser that tells a usage error in one line."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None):
            text = " ".join(message.split())
            print(f"mllmcl {command}: {text}; mllmcl {command} --help tells more", file=sys.stderr)
            raise SystemExit(USAGE)

    return Parser(prog=f"mllmcl {command}", description=description)


def _run_parser():
    parser = _parser("run", "Learn a stream of tasks and evaluate after each.")
    parser.add_argument("--config", action="config", help="a YAML file; may also be the first argument")
    parser.add_class_arguments(RunConfig, nested_key=None, fail_untyped=False)
    return parser


def _dashes(arguments: list[str]) -> list[str]:
    """A leading YAML file becomes --config, and --dry-run the boolean it is."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    return [word if word != "--dry-run" else "--dry_run=true" for word in arguments]


def _yaml(path: Path, parser) -> dict:
    """What a YAML file holds, where that is a mapping; a usage error where it is no YAML."""
    import yaml

    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"{path} cannot be read as YAML ({error})")
    return held if isinstance(held, dict) else {}


def _run(arguments: list[str]) -> int:
    parser = _run_parser()
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        from .sweep import run_sweep

        path = Path(arguments[0])
        if "sweep" in _yaml(path, parser):
            if _num_processes() > 1:
                raise ValueError(f"{path}: a sweep starts the processes of its runs, so start it without torchrun")
            return run_sweep(path, say=functools.partial(print, flush=True))
    config = parser.instantiate_classes(parser.parse_args(_dashes(arguments)))
    settings = RunConfig(**{name: config[name] for name in ("train", "model", "method", "stream", "dry_run")})
    return run(settings)


def _num_processes() -> int:
    """How many processes torchrun has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def build_model(config: ModelConfig, seed: int):
    """The MLLM of a configuration; a fresh projector is drawn from `seed`."""
    import torch

    from .models import MLLM
    from .training.rng import seed_everything

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        # torchrun gives each process of a machine a GPU of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    dtype = getattr(torch, config.dtype)
    seed_everything(seed)
    if config.pretrained is not None:
        mllm = MLLM.from_pretrained(config.pretrained, dtype=dtype, device=device)
    else:
        mllm = MLLM.compose(
            vision=config.vision,
            language=config.language,
            projector=config.projector,
            num_layers=config.num_layers,
            image_size=config.image_size,
            dtype=dtype,
            device=device,
        )
    return mllm.cache_images(config.feature_cache).share_inputs(config.share_inputs)


def check(settings: RunConfig):
    """Everything that can be checked without weights: method and options, stream and its items, the run folder."""
    from . import methods, streams
    from .evaluation import check_scorers

    method = methods.create(settings.method.name, **settings.method.options)
    stream = streams.load(settings.stream.name, root=settings.stream.root, **settings.stream.options)
    if not stream.tasks:
        raise ValueError(f"stream {stream.name} has no tasks")
    stream.validate()
    check_scorers(stream.tasks)
    _check_model(settings.model)
    text = settings.train.language_text
    if text not in (None, "python-topics") and not Path(text).is_file():
        raise ValueError(f'train.language_text must be "python-topics" or a file, got {text!r}')
    folder = Path(settings.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder, settings, method, stream)
    return method, stream


def _check_model(config: ModelConfig) -> None:
    """What of a model's configuration is known to be wrong before anything is loaded."""
    import torch

    from .options import check_at_least, check_model_name

    if config.pretrained is not None:
        check_model_name("model.pretrained", config.pretrained)
    else:
        from .models.composed import PROJECTORS

        check_model_name("model.vision", config.vision, ("efficientnet-lite0",))
        check_model_name("model.language", config.language, ("smollm2-135m-instruct",))
        if config.projector not in PROJECTORS:
            raise ValueError(f"model.projector must be one of {', '.join(PROJECTORS)}, got {config.projector!r}")
        if config.image_size is not None and (config.image_size <= 0 or config.image_size % 32):
            raise ValueError(f"model.image_size must be a positive multiple of 32, got {config.image_size}")
    check_at_least(config, 1, ("num_layers", "threads"))
    if config.device != "auto":
        try:
            kind = torch.device(config.device).type
        except RuntimeError as error:
            raise ValueError(f"model.device must be auto, cpu or cuda, got {config.device!r}") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"model.device: torch sees no CUDA device, got {config.device!r}")


def _check_folder(folder: Path, settings: RunConfig, method, stream) -> None:
    """That a run folder in use holds this run: the same method, stream and options."""
    if not (folder / "config.yaml").is_file():
        return
    from .training.records import options_of, other_run

    if settings.train.resume == "never":
        raise ValueError(f"output_dir {folder} holds a run already; train.resume=auto continues it")
    tasks = [{"name": task.name, "train": len(task.train), "test": len(task.test)} for task in stream.tasks]
    description = {
        "processes": _num_processes(),
        "method": {"name": method.name, "options": options_of(method)},
        "stream": {"name": stream.name, "tasks": tasks},
    }
    if reason := other_run(folder, settings.train, description):
        raise ValueError(f"output_dir {folder} holds another run: {reason}; take another folder")


def run(settings: RunConfig) -> int:
    """A whole run; prints the table and where the report lies."""
    method, stream = check(settings)
    if settings.dry_run:
        items = ", ".join(f"{task.name} ({len(task.train)} + {len(task.test)})" for task in stream.tasks)
        print(f"method {method.name}, stream {stream.name}: {items}\neverything fits; nothing was trained")
        return 0
    from .training import train

    mllm = build_model(settings.model, settings.train.seed)
    report = train(mllm, method, stream, settings.train)
    if os.environ.get("RANK", "0") == "0":
        print(report.table())
        print(f"report: {Path(settings.train.output_dir) / 'report.html'}")
    return 0


def _report(arguments: list[str]) -> int:
    parser = _parser("report", "Compare runs in one page and print their tables.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=None, help="the page; by default report.html of a single run")
    options = parser.parse_args(arguments)
    from .evaluation import Report, write_report
    from .evaluation.matrix import tell_apart

    output = options.output or (options.runs[0] if len(options.runs) == 1 else options.runs[0].parent) / "report.html"
    reports = [Report.load(folder) for folder in options.runs]
    write_report(options.runs, output)
    names = tell_apart([(report.matrix, folder) for report, folder in zip(reports, options.runs, strict=True)])
    print(Report.compare(reports, names))
    print(f"report: {output}")
    return 0


def _rows(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def _methods(arguments: list[str]) -> int:
    _parser("methods", "List the methods.").parse_args(arguments)
    from .methods import available

    for name, method in available().items():
        print(f"{name}\n  {method.summary}\n  source      {method.source}\n  stores      {method.stores}")
        beside = f"\n  step        and {method.extra_passes}" if method.extra_passes else ""
        print(f"  at test     needs {method.at_test}{beside}\n  deviations  {method.deviations}")
    return 0


def _streams(arguments: list[str]) -> int:
    _parser("streams", "List the streams.").parse_args(arguments)
    from .streams import available

    print(_rows([*available().items(), ("FOLDER", "any folder of LLaVA-style JSON")]))
    return 0


def _doctor(arguments: list[str]) -> int:
    parser = _parser("doctor", "Say what works on this machine and why the rest does not.")
    parser.add_argument("--check-batching", type=str, default=None, help="a model: batched answers against single ones")
    options = parser.parse_args(arguments)
    from .doctor import check_model_batching, diagnose

    if options.check_batching is None:
        print(diagnose())
        return 0
    text, equal = check_model_batching(options.check_batching)
    print(text)
    return 0 if equal else FAILED


def _export(arguments: list[str]) -> int:
    parser = _parser("export", "Copy a run's adapters out, reopened and counted.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--format", choices=["peft"], default="peft", help="of the folders written")
    parser.add_argument("--output", type=Path, default=None, help="where to; by default RUN/export")
    options = parser.parse_args(arguments)
    from .models.adapter_files import export_run

    for folder, layers in export_run(options.run, options.output or options.run / "export"):
        print(f"{folder}: {layers} layers")
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "run": (_run, "learn a stream of tasks, or a sweep of them: mllmcl run [CONFIG.yaml] [--key value ...]"),
    "report": (_report, "compare finished runs: mllmcl report RUN..."),
    "methods": (_methods, "list the methods, their sources and what they store"),
    "streams": (_streams, "list the streams"),
    "doctor": (_doctor, "say what works on this machine and why the rest does not"),
    "export": (_export, "copy a run's adapters out: mllmcl export RUN --format peft"),
}


def usage() -> str:
    lines = [f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: mllmcl COMMAND ...", "", *lines, "", "mllmcl COMMAND --help tells more"])


def _on_terminate(*_) -> None:
    raise SystemExit(TERMINATED)


def main(arguments: list[str] | None = None) -> int:
    """The program.

    Exit code 0, 1 for a failed run, 2 for wrong usage, 130 and 143 when it was interrupted, 141 when nobody reads on.
    """
    try:
        code = _command(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # `mllmcl methods | head` has seen enough; what is still held back has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_READ


def _command(arguments: list[str] | None) -> int:
    import signal

    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USAGE
    if arguments[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"mllmcl: no command {arguments[0]!r}{hint}\n\n{usage()}", file=sys.stderr)
        return USAGE
    # a thread that waits for another gives its core away; spinning makes a step ten times longer on a busy machine
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        return COMMANDS[arguments[0]][0](arguments[1:])
    except KeyboardInterrupt:
        print("mllmcl: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("MLLMCL_DEBUG", "0") not in ("", "0"):
            raise
        print(f"mllmcl {arguments[0]}: {error}", file=sys.stderr)
        return FAILED
