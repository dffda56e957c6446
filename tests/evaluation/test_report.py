"""Run folders become one page that needs nothing else."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mllmcl.evaluation import AccuracyMatrix, Report, write_report
from mllmcl.evaluation.matrix import tell_apart
from mllmcl.evaluation.run_files import read_run

from .made_up import NOTE, TASKS, make_run

VOID = {"meta", "img", "br", "line", "path", "rect", "circle"}


class Page(HTMLParser):
    """Text, attributes and nesting of a page; `loads` are the addresses a browser would fetch."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.text, self.loads = [], [], "", []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "action", "data")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data + " "

    def has(self, text: str) -> bool:
        return " ".join(text.split()) in " ".join(self.text.split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return make_run(home / "one", num_test=24), make_run(home / "two", method="made_up_finetune", keep=0.8, num_test=24)


@pytest.fixture
def run(runs, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


def draw(folders, tmp_path) -> Page:
    write_report(folders, tmp_path / "out" / "report.html")
    return Page(tmp_path / "out" / "report.html")


def test_one_run_shows_every_number_of_the_matrix(runs, tmp_path):
    page = draw([runs[0]], tmp_path)
    matrix = AccuracyMatrix.load(runs[0] / "matrix.json")
    cells = re.findall(r'<td class="[^"]*"[^>]*>([^<]*)</td>', page.source.split("Accuracy matrix")[1].split("<h2>")[0])
    rows = [matrix.zero_shot, *matrix.scores]
    wanted = [f"{100 * score:.1f}" for row in rows for score in row]
    # the last column is the mean over the tasks learned
    assert [cell for at, cell in enumerate(cells) if at % 6 < 5] == wanted
    assert cells[11::6] == [f"{100 * sum(row[: at + 1]) / (at + 1):.1f}" for at, row in enumerate(matrix.scores)]
    assert len(re.findall(r'class="unseen"', page.source)) == 5 + 4 + 3 + 2 + 1
    for name in TASKS:
        assert f'<th scope="row">after {name}</th>' in page.source


def test_headline_numbers_carry_n_and_interval(runs, tmp_path):
    page, metrics = draw([runs[0]], tmp_path), json.loads((runs[0] / "metrics.json").read_text())
    low, high = metrics["intervals"]["last"]
    assert page.has(f"Last {100 * metrics['last']:.1f} % 95 %: {100 * low:.1f} to {100 * high:.1f} n = 120")
    bwt = f"{100 * metrics['bwt']['T-1']:+.1f}".replace("-", "\N{MINUS SIGN}")
    assert page.has(f"BWT, divisor T\N{MINUS SIGN}1 {bwt} points")
    other = f"{100 * metrics['bwt']['T']:+.1f}".replace("-", "\N{MINUS SIGN}")
    assert page.has(f"divisor T: {other}")
    assert page.has(NOTE)
    assert page.has("mllmcl 0.1.0 torch 2.13.0")
    assert page.has("1/(T-1) sum_{t<T} (max_{t<=k<T} a[k,t] - a[T,t])")


def test_nothing_is_loaded_and_nothing_runs(runs, tmp_path):
    page = draw(list(runs), tmp_path)
    assert len(page.loads) == 5
    assert all(address.startswith("data:image/png;base64,") for address in page.loads)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page.source


def test_sections_of_one_run(runs, tmp_path):
    page = draw([runs[0]], tmp_path)
    assert re.findall("<h2>([^<]*)</h2>", page.source) == [
        "Accuracy matrix", "Each task over time", "Average over time", "Forgetting", "Routing", "Training loss",
        "Time and memory", "Tasks", "Samples", "How the numbers are defined", "Set-up",
    ]  # fmt: skip
    # 60 logged steps of 2.1 s, a second before the end
    assert page.has("2 min 07 s + 40 s 2.60 GiB")
    assert page.has("after finance")
    assert page.has("gold answer yes")
    assert page.has("expert 1")


def test_several_runs_are_compared(runs, tmp_path):
    page = draw(list(runs), tmp_path)
    assert "Comparison" in re.findall("<h2>([^<]*)</h2>", page.source)
    for folder in runs:
        report = Report.load(folder)
        for key in ("last", "average", "finetune"):
            assert page.has(f"{100 * report.metrics[key]:.1f}")
        for row in report.matrix.scores:
            assert all(page.has(f"{100 * score:.1f}") for score in row)
    assert page.source.count('class="best"') >= 5
    assert page.has("made_up_finetune")


def test_hostile_text_stays_text(run, tmp_path):
    hostile = '</td><script>alert("x")</script><img src=http://example.invalid/x onerror=alert(1)>'
    for path in (run / "predictions").iterdir():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["question"] = line["prediction"] = line["gold"] = hostile
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("matrix.json", "metrics.json", "events.jsonl", "config.yaml", "samples/samples.json"):
        path = run / name
        path.write_text(path.read_text().replace("finance", "<b onclick=alert(1)>fin&ance</b>"))
    page = draw([run], tmp_path)
    assert page.has(hostile)
    assert page.has("after <b onclick=alert(1)>fin&ance</b>")
    assert "script" not in page.tags
    assert all(address.startswith("data:") for address in page.loads)


def test_a_torn_last_event_does_not_matter(run, tmp_path):
    whole = draw([run], tmp_path)
    path = run / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": "2025-11-23T10:30:00", "event": "step", "lo')
    assert draw([run], tmp_path).source == whole.source


@pytest.mark.parametrize(
    ("name", "note", "lost"),
    [
        ("metrics.json", "No metrics.json", "4,884,480"),
        ("config.yaml", "No config.yaml", "Set-up"),
        ("events.jsonl", "No events.jsonl", "Training loss"),
        ("predictions", "No predictions/*.jsonl", "gold answer"),
        ("samples", "No samples/samples.json", "gold answer"),
    ],
)
def test_what_is_missing_is_left_out_and_said(run, tmp_path, name, note, lost):
    assert draw([run], tmp_path).has(lost)
    shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    page = draw([run], tmp_path)
    assert page.has(note)
    assert not page.has(lost)
    assert page.has("Accuracy matrix")


def test_only_the_matrix(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "matrix.json", bare)
    page = draw([bare], tmp_path)
    assert page.has(f"Last {100 * Report.load(run).metrics['last']:.1f} %")


def test_intervals_come_from_the_predictions_where_metrics_lack_them(run, tmp_path):
    whole = draw([run], tmp_path)
    (run / "metrics.json").unlink()
    page = draw([run], tmp_path)
    assert re.findall("95 %: [^<]*", whole.source) == re.findall("95 %: [^<]*", page.source)
    assert page.source.count("95 %: ") == 5


def test_the_matrix_is_needed(run, tmp_path):
    (run / "matrix.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run/matrix\.json: missing"):
        draw([run], tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["matrix.json", "metrics.json", "config.yaml", "samples/samples.json"])
def test_a_damaged_file_is_named(run, tmp_path, name):
    (run / name).write_text('{"rows": [')
    with pytest.raises(ValueError, match=name):
        draw([run], tmp_path)


def test_an_unfinished_run(tmp_path):
    page = draw([make_run(tmp_path / "part", num_test=12, learned=2)], tmp_path)
    assert page.has("The run has learned 2 of 5 tasks; all numbers are over these.")
    assert page.has("after medical")
    assert not page.has("after driving")
    assert '<th scope="col">medical</th>' in page.source.split("<h2>Routing</h2>")[1]


def test_a_run_of_which_no_task_is_learned(run, tmp_path):
    AccuracyMatrix(tasks=tuple(TASKS), zero_shot=(0.1,) * 5).save(run / "matrix.json")
    with pytest.raises(ValueError, match=r"matrix\.json: no task has been learned yet"):
        draw([run], tmp_path)


def test_one_task_without_zero_shot(tmp_path):
    AccuracyMatrix(tasks=("only",), scores=((0.5,),), num_test=(4,), stream="s", method="m").save(
        tmp_path / "matrix.json"
    )
    page = draw([tmp_path], tmp_path)
    assert page.has("BWT, divisor T\N{MINUS SIGN}1 \N{EN DASH}")
    assert "Forgetting" not in re.findall("<h2>([^<]*)</h2>", page.source)


def test_a_cell_that_was_not_measured_is_a_dash(run, tmp_path):
    matrix = json.loads((run / "matrix.json").read_text())
    matrix["rows"][2]["scores"][0] = None
    (run / "matrix.json").write_text(json.dumps(matrix))
    page = draw([run], tmp_path)
    assert '<td class="none">&ndash;</td>' in page.source


def test_runs_over_other_tasks_are_refused(runs, tmp_path):
    AccuracyMatrix(tasks=("x",), scores=((0.5,),)).save(tmp_path / "other" / "matrix.json")
    with pytest.raises(ValueError, match="the same tasks in the same order"):
        draw([runs[0], tmp_path / "other"], tmp_path)
    with pytest.raises(ValueError, match="a list of at least one run folder"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(ValueError, match="a list of at least one run folder"):
        write_report(runs[0], tmp_path / "x.html")


def test_a_resumed_run_counts_steps_once_and_no_pause(run):
    before, starts = read_run(run).losses()
    costs = read_run(run).costs()
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    at = next(place for place, line in enumerate(lines) if line.get("step") == 50)
    # killed after step 50, continued a day later from step 30
    later = [{**line, "time": line["time"].replace("-23T", "-24T")} for line in lines[at - 3 :]]
    resume = {"time": "2025-11-24T09:00:00.000+00:00", "event": "resume"}
    lines = [*lines[: at + 1], resume, later[0], *later[1:]]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = read_run(run)
    assert again.losses() == (before, starts)
    # the first step after the resume holds the gap to it, so the resume is stamped just before
    resume["time"] = later[0]["time"]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    longer = read_run(run).costs()
    assert longer[0].train_seconds == pytest.approx(costs[0].train_seconds + 3 * 2.1)
    assert longer[1:] == costs[1:]


def test_a_picture_from_elsewhere_is_not_shown(run, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "secret.png")
    entries = [{"id": "finance-0", "task": "finance", "file": "../../secret.png"}]
    (run / "samples" / "samples.json").write_text(json.dumps(entries))
    with pytest.raises(FileNotFoundError, match=r"samples/secret\.png"):
        draw([run], tmp_path)


def test_report_saves_and_loads_and_writes_the_page_of_a_run(runs, tmp_path):
    report = Report.load(runs[0])
    report.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["matrix.json", "metrics.json", "report.html"]
    assert Report.load(tmp_path) == report
    assert Page(tmp_path / "report.html").has("Accuracy matrix")


def test_report_names_what_it_cannot_read(run):
    (run / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metrics\.json: expected an object, got list"):
        Report.load(run)
    (run / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json: not JSON"):
        Report.load(run)
    (run / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        Report.load(run)


TABLE = """\
task  zero-shot  just trained  last  forgetting
-----------------------------------------------
a          10.0          80.0  50.0        30.0
bb            -          70.0  70.0           -

last (MFN)           60.0
average (MAA)        70.0
just trained (MFT)   75.0
BWT, divisor T-1    -30.0
BWT, divisor T      -15.0
router accuracy      87.5
seconds per step    0.125"""


def test_table_of_a_run():
    matrix = AccuracyMatrix(tasks=("a", "bb"), zero_shot=(0.1, None), scores=((0.8, None), (0.5, 0.7)))
    metrics = {
        "last": 0.6, "average": 0.7, "finetune": 0.75, "bwt": {"T": -0.15, "T-1": -0.3}, "seconds_per_step": 0.125,
        "forgetting": {"mean": 0.3, "per_task": {"a": 0.3, "bb": None}}, "router": {"accuracy": 0.875},
    }  # fmt: skip
    assert Report(matrix=matrix, metrics=metrics).table() == TABLE


def test_comparison_table(runs):
    reports = [Report.load(folder) for folder in runs]
    lines = Report.compare(reports).splitlines()
    assert lines[0].split()[-len(runs) :] == [report.matrix.method for report in reports]
    rows = {line.rsplit(maxsplit=len(runs))[0]: line.split()[-len(runs) :] for line in lines if line[0] != "-"}
    for name in reports[0].matrix.tasks:
        last = [report.matrix.score(report.matrix.num_learned - 1, name) for report in reports]
        assert rows[name] == [f"{100 * score:.1f}" for score in last]
    assert rows["average (MAA)"] == [f"{100 * report.metrics['average']:.1f}" for report in reports]
    assert "router accuracy" in rows and "seconds per step" in rows and "share of the step in expert mixing" in rows
    with pytest.raises(ValueError, match="reports: expected at least one"):
        Report.compare([])
    with pytest.raises(ValueError, match="names: expected one for each of the 1 reports, got 0"):
        Report.compare(reports[:1], [])


def test_runs_of_one_method_are_told_apart(tmp_path):
    matrix = AccuracyMatrix(tasks=("a",), zero_shot=(None,), scores=((0.8,),), method="lora", seed=0)
    other = replace(matrix, seed=1)
    one, two = tmp_path / "one", tmp_path / "two"
    assert tell_apart([(matrix, one), (replace(matrix, method="mage"), two)]) == ["lora", "mage"]
    assert tell_apart([(matrix, one), (other, two)]) == ["lora, seed 0", "lora, seed 1"]
    assert tell_apart([(matrix, one), (matrix, two)]) == ["one", "two"]
    assert tell_apart([(matrix, one), (matrix, two / "one")]) == [str(one), str(two / "one")]
    reports = [Report(matrix=matrix, metrics={}), Report(matrix=other, metrics={})]
    assert "lora, seed 1" in Report.compare(reports, ["lora, seed 0", "lora, seed 1"]).splitlines()[0]


def test_plot_holds_every_cell(runs):
    report = Report.load(runs[0])
    heat, curves = report.plot().axes
    texts = [text.get_text() for text in heat.texts]
    assert texts == [f"{100 * score:.1f}" for row in (report.matrix.zero_shot, *report.matrix.scores) for score in row]
    assert [line.get_label() for line in curves.lines] == [*TASKS, "average of tasks learned"]
    last = [row[-1] for row in (line.get_ydata() for line in curves.lines[:-1])]
    assert last == pytest.approx([100 * score for score in report.matrix.scores[-1]])
