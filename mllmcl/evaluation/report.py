"""The report page: one HTML file that needs nothing else, of one run or of several beside each other."""

# T tasks, K of them learned so far

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..files import atomic_write
from . import charts
from .charts import NONE, percent, signed
from .matrix import tell_apart
from .metrics import METRICS
from .page_style import STYLE
from .run_files import RunFiles, TaskCost, read_run

__all__ = ["write_report"]

#: key in metrics, label, key of its interval
TILES = (
    ("last", "Last", "last"),
    ("average", "Average over time", "average"),
    ("finetune", "Just trained", "finetune"),
    ("bwt_T-1", "BWT, divisor T&minus;1", "bwt_T-1"),
    ("forgetting", "Forgetting", "forgetting"),
    ("router", "Router accuracy", None),
)


def write_report(runs: Sequence[str | Path], out: str | Path) -> None:
    """Draw run folders into one self-contained page, written atomically.

    The page is read from the files of the folders alone: `matrix.json` has to be there; what is missing of
    `config.yaml`, `metrics.json`, `events.jsonl`, `predictions/` and `samples/` is left out with a note. It loads
    nothing, has no scripts, and follows the reader's light or dark setting.

    Args:
        runs: one folder, or several of the same tasks, which are then compared.
        out: the HTML file.

    Raises:
        FileNotFoundError: a folder has no `matrix.json`.
        ValueError: no folder, a damaged file (named), or runs over different tasks.
    """
    if isinstance(runs, (str, Path)) or not runs:
        raise ValueError(f"runs: expected a list of at least one run folder, got {runs!r}")
    found = [read_run(folder) for folder in runs]
    for run in found[1:]:
        if run.matrix.tasks != found[0].matrix.tasks:
            raise ValueError(
                f"runs: expected the same tasks in the same order, got {list(found[0].matrix.tasks)} in "
                f"{found[0].folder} and {list(run.matrix.tasks)} in {run.folder}"
            )
    atomic_write(out, _page(found))


def _page(runs: list[RunFiles]) -> str:
    names = tell_apart([(run.matrix, run.folder) for run in runs])
    sections = (
        _header(runs, names),
        _headline(runs, names),
        _matrices(runs, names),
        _over_time(runs, names),
        _forgetting(runs, names),
        _routing(runs, names),
        _training(runs, names),
        _tasks(runs, names),
        _samples(runs, names),
        _definitions(),
        _setup(runs, names),
    )
    title = f"{' and '.join(names)} on {runs[0].matrix.stream or 'a stream'}"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n<footer>Made by mllmcl from the files of the run folder.</footer>\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, lead: str, *parts: str) -> str:
    body = "".join(parts)
    text = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{text}{body}</section>" if body else ""


def _subhead(name: str) -> str:
    return f'<h3 class="run">{escape(name)}</h3>'


def _key(names: Sequence[str]) -> str:
    """Which colour is which run; nothing for a single one."""
    if len(names) == 1:
        return ""
    items = (f'<li><i style="--c:var(--run-{at % 6})"></i>{escape(name)}</li>' for at, name in enumerate(names))
    return f'<ul class="key">{"".join(items)}</ul>'


def _header(runs: list[RunFiles], names: list[str]) -> str:
    first = runs[0]
    stream = first.matrix.stream or "unnamed stream"
    if len(runs) == 1:
        title = f"{escape(names[0])} <span>on {escape(stream)}</span>"
    else:
        title = f"{len(runs)} runs <span>on {escape(stream)}</span>"
    facts = [f"{len(first.matrix.tasks)} tasks"]
    facts.append("seed " + ", ".join(dict.fromkeys(str(run.matrix.seed) for run in runs)))
    date = first.metrics.get("finished") or first.config.get("started")
    facts += [str(date)[:10]] if date else []
    facts += [f"{key} {text}" for key, text in _versions(first).items() if key in ("mllmcl", "torch", "transformers")]
    dtype, batch = first.metrics.get("dtype"), first.metrics.get("eval_batch_size")
    facts += [str(dtype)] if dtype else []
    facts += [f"evaluation batch {batch}"] if batch else []
    meta = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<header><p class="eyebrow">Continual learning report</p><h1>{title}</h1><ul class="meta">{meta}</ul>'
        f"{_notes(runs, names)}</header>"
    )


def _notes(runs: list[RunFiles], names: list[str]) -> str:
    """The stream's own note, then what the folders lack."""
    lines = []
    for run in runs:
        stream = run.config.get("stream")
        note = run.metrics.get("note") or (stream.get("note") if isinstance(stream, dict) else None)
        if note and (line := f"About the stream: {note}") not in lines:
            lines.append(line)
    if len({run.matrix.stream for run in runs}) > 1 or len({run.matrix.num_test for run in runs}) > 1:
        lines.append("These runs differ in stream or number of test items: compare their numbers with care.")
    for run, name in zip(runs, names, strict=True):
        lines += [f"{name}: {note}" if len(runs) > 1 else note for note in run.notes]
    body = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="note">{body}</div>' if body else ""


def _versions(run: RunFiles) -> dict:
    found = run.metrics.get("versions") or run.config.get("versions")
    return found if isinstance(found, dict) else {}


def _value(run: RunFiles, key: str) -> float | None:
    metrics = run.metrics
    if key == "forgetting":
        return metrics["forgetting"]["mean"]
    if key == "router":
        return (metrics["router"] or {}).get("accuracy")
    return metrics["bwt"][key.removeprefix("bwt_")] if key.startswith("bwt_") else metrics[key]


def _number(key: str, share: float | None) -> str:
    return signed(share) if key.startswith("bwt") else percent(share)


def _interval(run: RunFiles, key: str | None) -> str:
    pair = (run.metrics["intervals"] or {}).get(key)
    return "" if pair is None else f"{percent(pair[0])} to {percent(pair[1])}"


def _headline(runs: list[RunFiles], names: list[str]) -> str:
    shown = [tile for tile in TILES if tile[0] != "router" or any(_value(run, "router") is not None for run in runs)]
    if len(runs) > 1:
        return _comparison(runs, names, shown)
    tiles = "".join(_tile(runs[0], *tile) for tile in shown)
    return f'<div class="tiles">{tiles}</div>'


def _tile(run: RunFiles, key: str, label: str, interval: str | None) -> str:
    """A number with its unit; small below it the interval, n, and for BWT the other divisor."""
    share, span, counts = _value(run, key), _interval(run, interval), run.part.num_test
    unit = "" if share is None else " points" if key in ("bwt_T-1", "forgetting") else " %"
    small = [f"95 %: {span}"] if span else []
    small += [f"divisor T: {signed(_value(run, 'bwt_T'))}"] if key == "bwt_T-1" else []
    small += [f"n = {sum(counts):,}"] if counts is not None else []
    return (
        f'<div class="tile"><span>{label}</span><b>{_number(key, share)}<small>{unit}</small></b>'
        f"<em>{'<br>'.join(small)}</em></div>"
    )


def _comparison(runs: list[RunFiles], names: list[str], shown: Sequence[tuple]) -> str:
    head = "".join(f"<th>{label}</th>" for _, label, _ in shown)
    best = {}
    for key, _, _ in shown:
        known = [value for run in runs if (value := _value(run, key)) is not None]
        best[key] = (min if key == "forgetting" else max)(known) if known else None
    lines = []
    for at, (run, name) in enumerate(zip(runs, names, strict=True)):
        cells = []
        for key, _, interval in shown:
            share, span = _value(run, key), _interval(run, interval)
            css = ' class="best"' if share is not None and share == best[key] else ""
            cells.append(f"<td{css}>{_number(key, share)}<small>{span}</small></td>")
        dot = f'<i style="--c:var(--run-{at % 6})"></i>'
        lines.append(f"<tr><td>{dot}{escape(name)}</td>{''.join(cells)}</tr>")
    counts = runs[0].part.num_test
    number = "" if counts is None else f", n = {sum(counts):,} test items"
    table = f'<div class="scroll"><table class="data"><thead><tr><th>run</th>{head}</tr></thead><tbody>'
    lead = (
        f"In percent{number}. Small: 95 % interval over the test items of one run; the spread over seeds is not in it."
    )
    return _section("Comparison", lead, f"{table}{''.join(lines)}</tbody></table></div>")


def _matrices(runs: list[RunFiles], names: list[str]) -> str:
    lead = (
        "Accuracy in percent. Rows: after which task; columns: task evaluated; bold: just trained. "
        "Read a column downwards to see a task being forgotten."
    )
    scale = '<div class="scale">0 <i></i> 100 % <u></u> task not learned yet, or not measured</div>'
    parts = []
    for run, name in zip(runs, names, strict=True):
        parts.append(_subhead(name) if len(runs) > 1 else "")
        parts.append(charts.heat_map(run.matrix))
    return _section("Accuracy matrix", lead, *parts, scale)


def _over_time(runs: list[RunFiles], names: list[str]) -> str:
    matrices = [run.matrix for run in runs]
    count = max(matrix.num_learned for matrix in matrices)
    panels = []
    for task in range(count):
        span = ""
        if len(runs) == 1:
            own, now = matrices[0].score(task, task), matrices[0].score(matrices[0].num_learned - 1, task)
            span = f"<span>{percent(own)} &rarr; {percent(now)}</span>"
        title = f"<h3>{escape(matrices[0].tasks[task])}{span}</h3>"
        panels.append(f'<figure class="panel">{title}{charts.task_panel(matrices, task)}</figure>')
    thin = " Thin lines: the other tasks." if len(runs) == 1 else ""
    lead = f"Accuracy of each task against the number of tasks learned; shaded: before the task was learned.{thin}"
    average = f'<div class="scroll wide">{charts.average_chart(matrices)}</div>'
    return _section(
        "Each task over time", lead, _key(names), f'<div class="panels">{"".join(panels)}</div>'
    ) + _section(
        "Average over time", "Mean accuracy of the tasks learned so far, after each task.", _key(names), average
    )


def _forgetting(runs: list[RunFiles], names: list[str]) -> str:
    part = runs[0].part
    if part.num_learned < 2:
        return ""
    lines = [_bar("task", "0 to 100 %", "points lost", "head")]
    for task, name in enumerate(part.tasks[:-1]):
        tracks, numbers = [], []
        for at, run in enumerate(runs):
            if task >= run.part.num_learned - 1:
                continue
            fall, now = run.metrics["forgetting"]["per_task"].get(name), run.part.score(run.part.num_learned - 1, task)
            tracks.append(_fall_track(now, fall, at))
            numbers.append(percent(fall))
        joined = " / ".join(numbers)
        lines.append(_bar(escape(name), "".join(tracks), joined))
    lead = "From the best score since the task was learned (ring) to the score at the end (dot)."
    return _section("Forgetting", lead, _key(names), f'<div class="bars">{"".join(lines)}</div>')


def _bar(label: str, tracks: str, numbers: str, css: str = "group") -> str:
    return f'<div class="bar"><div>{label}</div><div class="{css}">{tracks}</div><div class="num">{numbers}</div></div>'


def _fall_track(now: float | None, fall: float | None, at: int) -> str:
    if now is None or fall is None:
        return '<div class="track"></div>'
    best = now + fall
    left, width = 100 * min(now, best), 100 * abs(fall)
    return (
        f'<div class="track" style="--c:var(--run-{at % 6})">'
        f'<b class="span" style="left:{left:.2f}%;width:{width:.2f}%"></b>'
        f'<span class="from" style="left:{100 * best:.2f}%"></span>'
        f'<span class="at" style="left:{100 * now:.2f}%"></span></div>'
    )


def _routing(runs: list[RunFiles], names: list[str]) -> str:
    parts = []
    for run, name in zip(runs, names, strict=True):
        router = run.metrics["router"]
        if not router or not router.get("confusion"):
            continue
        accuracy = router.get("accuracy")
        text = "" if accuracy is None else f"Accuracy {percent(accuracy)} %."
        parts.append(_subhead(name) if len(runs) > 1 else "")
        parts.append(charts.confusion_table(router["confusion"], run.part.tasks))
        parts.append(f'<p class="caption">{text}</p>' if text else "")
    lead = "Test items after the last task. Rows: task the item belongs to; columns: expert the router chose."
    return _section("Routing", lead, *parts)


def _training(runs: list[RunFiles], names: list[str]) -> str:
    curves = [run.losses() for run in runs]
    drawn = [(curve, name) for curve, name in zip(curves, names, strict=True) if curve[0]]
    parts = []
    if len(drawn) == len(runs):
        parts.append(_key(names) + f'<div class="scroll wide">{charts.loss_chart(curves)}</div>')
    loss = _section("Training loss", "Faint: as logged; strong: running mean within a task." if len(runs) == 1 else
                    "Running mean within a task.", *parts)  # fmt: skip
    return loss + _costs(runs, names)


def _costs(runs: list[RunFiles], names: list[str]) -> str:
    costs = [run.costs() for run in runs]
    seconds = [cost.train_seconds or 0.0 for some in costs for cost in some]
    seconds += [cost.evaluation_seconds or 0.0 for some in costs for cost in some]
    if not any(seconds):
        return ""
    top = max((cost.train_seconds or 0.0) + (cost.evaluation_seconds or 0.0) for some in costs for cost in some)
    lines = [_bar("task", "", "training + evaluation", "head")]
    for task, name in enumerate(runs[0].part.tasks):
        tracks, numbers = [], []
        for at, some in enumerate(costs):
            if task < len(some):
                tracks.append(_cost_track(some[task], top, at))
                numbers.append(_cost_text(some[task]))
        joined = "<br>".join(numbers)
        lines.append(_bar(escape(name), "".join(tracks), joined))
    facts = _run_facts(runs, names)
    lead = "Strong: training; light: evaluation of all tasks after it; memory: highest so far in the run."
    return _section("Time and memory", lead, _key(names), f'<div class="bars">{"".join(lines)}</div>', facts)


def _cost_track(cost: TaskCost, top: float, at: int) -> str:
    train, test = 100 * (cost.train_seconds or 0.0) / top, 100 * (cost.evaluation_seconds or 0.0) / top
    return (
        f'<div class="track full" style="--c:var(--run-{at % 6})"><b style="left:0;width:{train:.2f}%"></b>'
        f'<b class="light" style="left:{train:.2f}%;width:{test:.2f}%"></b></div>'
    )


def _cost_text(cost: TaskCost) -> str:
    memory = "" if cost.peak_memory_bytes is None else f" <small>{_bytes(cost.peak_memory_bytes)}</small>"
    return f"{_duration(cost.train_seconds)} + {_duration(cost.evaluation_seconds)}{memory}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _run_facts(runs: list[RunFiles], names: list[str]) -> str:
    """Seconds a step, share of expert mixing, peak memory, trainable and stored size of each run, where known."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        metrics, facts = run.metrics, []
        if metrics.get("seconds_per_step") is not None:
            facts.append(f"{metrics['seconds_per_step']:.3f} s a step")
        if metrics.get("share_expert_mixing") is not None:
            facts.append(f"{percent(metrics['share_expert_mixing'])} % of a step in expert mixing")
        if metrics.get("peak_memory_bytes") is not None:
            facts.append(f"peak {_bytes(metrics['peak_memory_bytes'])}")
        if metrics.get("trainable_parameters") is not None:
            facts.append(f"{metrics['trainable_parameters']:,} trainable parameters")
        if metrics.get("stored_bytes") is not None:
            facts.append(f"{_bytes(metrics['stored_bytes'])} kept of model and method")
        label = f"{escape(name)}: " if len(runs) > 1 else ""
        rows += [label + ", ".join(facts) + "."] if facts else []
    return f'<p class="caption" style="margin-top:1rem">{"<br>".join(rows)}</p>' if rows else ""


def _tasks(runs: list[RunFiles], names: list[str]) -> str:
    parts = []
    for run, name in zip(runs, names, strict=True):
        parts.append(_subhead(name) if len(runs) > 1 else "")
        parts.append(_task_table(run))
    lead = "In percent; points for forgetting."
    if any(run.metrics["errors"] and any(run.metrics["errors"].values()) for run in runs):
        lead += (
            " Errors as a share of all items: HAL, a wrong one of the task's own answers; IUF, an answer in another "
            "form or of another task; OTH, anything else; only for tasks with a closed set of answers."
        )
    return _section("Tasks", lead, *parts)


def _task_table(run: RunFiles) -> str:
    part, errors = run.part, run.metrics["errors"] or {}
    kinds = ("HAL", "IUF", "OTH") if any(errors.values()) else ()
    heads = ("task", "n", "zero-shot", "just trained", "last", "forgetting", *kinds)
    lines = []
    for task, name in enumerate(part.tasks):
        fall = run.metrics["forgetting"]["per_task"].get(name)
        scores = part.score(None, task), part.score(task, task), part.score(part.num_learned - 1, task), fall
        count = NONE if part.num_test is None else f"{part.num_test[task]:,}"
        cells = [escape(name), count, *map(percent, scores)]
        cells += [percent((errors.get(name) or {}).get(kind)) for kind in kinds]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{label}</th>" for label in heads)
    return (
        f'<div class="scroll"><table class="data"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _samples(runs: list[RunFiles], names: list[str]) -> str:
    cards = []
    for picture in runs[0].pictures:
        answers = [run.answers(picture.id, picture.task) for run in runs]
        known = next((item for some in answers for _, item in some), None)
        if known is None:
            continue
        rows = [f'<tr class="gold"><th>gold answer</th><td>{escape(known.gold)}</td><td></td></tr>']
        for run, name, some in zip(runs, names, answers, strict=True):
            # beside each other only the final answers are shown
            shown = some if len(runs) == 1 else some[-1:]
            rows += [_answer_row(run, row, item, name if len(runs) > 1 else None) for row, item in shown]
        image = (
            f'<img src="{picture.uri}" width="{picture.width}" height="{picture.height}" '
            f'alt="picture of {escape(picture.id)}">'
        )
        cards.append(
            f'<article class="sample"><div>{image}</div><div><p class="caption" style="margin:0">{escape(picture.task)}'
            f' &middot; {escape(picture.id)}</p><p class="question">{escape(known.question)}</p>'
            f"<table>{''.join(rows)}</table></div></article>"
        )
    lead = "What was answered to the same question as tasks were learned, and by which expert."
    body = f'<div class="samples">{"".join(cards)}</div>' if cards else ""
    return _section("Samples", lead, body)


def _answer_row(run: RunFiles, row: int | None, item, name: str | None) -> str:
    tasks = run.matrix.tasks
    label = name if name is not None else "zero-shot" if row is None else f"after {tasks[row]}"
    is_right = item.score >= 0.5
    mark = '<span class="tick">&#10003;</span>' if is_right else "&#10007;"
    expert = ""
    if item.expert is not None:
        expert = "base model" if item.expert < 0 else f"expert {item.expert + 1}"
    css = "" if is_right else ' class="wrong"'
    text = escape(item.prediction) or "<i>no answer</i>"
    return f"<tr><th>{escape(label)}</th><td{css}>{mark} {text}</td><td>{expert}</td></tr>"


def _definitions() -> str:
    items = "".join(
        f"<dt>{escape(metric.label)}</dt>"
        f"<dd><code>{escape(metric.formula)}</code><small>{escape(metric.source)}</small></dd>"
        for metric in METRICS.values()
    )
    lead = (
        "a[k,t] is the score on task t after task k was learned, z[t] the zero-shot score, T the number of tasks. A "
        "number that needs a cell that was not measured is left out. Intervals: 2.5 to 97.5 percentile of 1,000 draws "
        "of the test items with replacement, the same draw for all rows."
    )
    return _section("How the numbers are defined", lead, f'<dl class="formulas">{items}</dl>')


def _setup(runs: list[RunFiles], names: list[str]) -> str:
    parts = []
    for run, name in zip(runs, names, strict=True):
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td>{escape(text)}</td></tr>" for key, text in _flatten("", run.config)
        )
        if rows:
            label = f"Configuration of {name}" if len(runs) > 1 else "Configuration and versions"
            parts.append(f"<details><summary>{escape(label)}</summary><table>{rows}</table></details>")
    return _section("Set-up", "", *parts)


def _flatten(prefix: str, value: object) -> Iterable[tuple[str, str]]:
    """Dotted names and texts of a nested configuration."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for place, item in enumerate(value):
            yield from _flatten(f"{prefix}[{place}]", item)
    else:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
