"""The report, from run directories that are made up: whole, broken, hostile."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_trd.records.prefix_failure import (
    FILE,
    Counts,
    Curve,
    Estimate,
    Group,
    PartFigures,
    PrefixFailure,
)
from nemo_trd.records.read import read_runs
from nemo_trd.report.main import main, page
from nemo_trd.report.marked import LEVELS, SHOWN_TOKENS, choose, show
from nemo_trd.report.plots import Line, curves

HOSTILE = "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)>$\\frac$"
SECTIONS = ["glance", "learning", "rewriting", "likelihood", "time", "staleness", "samples"]
WIDTHS = (390, 1280)


def sample(step: int = 2, index: int = 0, text: str = "x", **changed: Any) -> dict[str, Any]:
    tokens = ["so ", f"{text}\n", "\n", "5", "<|end|>"]
    rollout = {"token_ids": [1, 2, 3, 4, 0], "tokens": tokens, "finish_reason": "stop"}
    rewrite = {"token_ids": [1, 2, 3, 9, 9, 0], "tokens": [*tokens[:3], "1", "7", tokens[-1]]}
    return {
        "step": step,
        "prompt_index": index,
        "sample_index": 0,
        "problem": f"how many {text}?",
        "answer": "17",
        "rollout": {"correct": False, "text": "", "weight_version": step - 1, **rollout},
        "refinement": {
            "correct": True,
            "rejection": None,
            "shortened": [],
            "text": "",
            "finish_reason": "stop",
            "weight_version": 0,
            **rewrite,
        },
        "trained_on": "refinement",
        "labels": {
            "divergence": [0.0, 0.05, 0.3, 0.7, 2.5, 0.01],
            "student_nll": [0.5] * 6,
            "teacher_nll": [0.25] * 6,
        },
        **changed,
    }


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(path: Path, steps: int = 30, text: str = "x", **settings: Any) -> Path:
    """A directory as a run of `steps` steps leaves it."""
    path.mkdir(parents=True)
    config = {"run": {"dir": str(path)}, "train": {"num_steps": steps}, "loss": settings}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {
            "step": step,
            **{"loss": 1 / step, "student_nll": 0.9, "teacher_nll": 0.4, "staleness": 1.0},
            **{"rollouts": 8, "accepted": 7, "rejected_truncated": 1, "undecided": 0},
            **{"wrong_to_wrong": 1, "wrong_to_right": 3, "right_to_wrong": 1, "right_to_right": 2},
            **{"first_difference": 20.0, "first_difference_share": 0.5, "kept_share": 0.75},
            **{"rollout_tokens": 40.0, "refinement_tokens": 44.0 + step, "unchanged": 0.25},
            **{"seconds/rollout": 1.0, "seconds/student": 0.5, "seconds/step": 2.0},
            **{"seconds/refinement": 0.25, "seconds/student_pool": 1.0},
            **({"seconds/teacher_pool": 0.75} if step > 1 else {}),
        }
        for step in range(1, steps + 1)
    ]
    write_lines(path / "metrics.jsonl", lines)
    scores = [
        {"step": s, "avg@8": 0.2 + s / 100, "pass@8": 0.8, "stderr": 0.01} for s in (0, steps)
    ]
    write_lines(path / "evaluation.jsonl", scores)
    samples = [sample(20, index, text) for index in range(12)]
    write_lines(path / "samples" / "step_000020.jsonl", samples)
    (path / "summary.json").write_text("{}")
    return path


def prefix_failure(text: str = "a student") -> str:
    """RUN_DIR/prefix_failure.json of one wrong rollout without a rewrite."""

    def estimate(mean: float) -> Estimate:
        return Estimate(mean=mean, low=mean / 2, high=None if mean == 0 else 2 * mean)

    kind = {"source": "rollout", "teacher_context": "prompt", "verdict": "wrong"}
    part = PartFigures(
        trajectories=1,
        tokens=3,
        token_share=estimate(0.5),
        gradient_share={"jsd": estimate(0.75)},
        hidden_gradient_share={},
        means={
            "teacher_entropy": estimate(0.25),
            "student_entropy": estimate(0),
            "jsd": estimate(2),
            "student_nll": estimate(1.75),
            "teacher_nll": estimate(0.5),
        },
        counts={},
    )
    lists = {"position": [-1, 0, 1], "trajectories": [1, 1, 1], "mean": [0.1, 0.5, 0.2]}
    lists |= {"low": [None, 0.2, 0.1], "high": [None, 0.6, 0.3]}
    names = ("teacher_entropy", "jsd", "top2_gap")
    return PrefixFailure(
        **{"student": text, "teacher": "a teacher", "mode": "opd", "teacher_context": "refine"},
        **{"divergence": "jsd", "beta": 0.5, "temperature": 1.0, "locator": "first_difference"},
        **{"confidence": 0.95, "resamples": 10, "counts": Counts(wrong=1)},
        groups=[Group(parts=dict.fromkeys(("whole", "before", "after"), part), **kind)],
        curves=[Curve(alignment="distance", figure=n, **lists, **kind) for n in names],
    ).model_dump_json()


class Reader(HTMLParser):
    """The words of a page, its elements, and what tags it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


def report(*directories: Path) -> str:
    return page(read_runs(directories))


def test_a_run_is_written_into_its_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main([str(run), "--output", str(tmp_path / "other.html")]) == 0
    text = (run / "report.html").read_text()
    assert text == (tmp_path / "other.html").read_text()
    assert "Not in the records" not in text
    words = Reader(text).words
    assert "0.200 → 0.500" in words and "30 of 30" in words
    assert "75.0%" in words and "33.3%" in words  # 3 of 4 repaired, 1 of 3 spoiled
    assert "rejected, truncated: 30" in words
    assert re.search(r"student_pool\s*80\.0%\s*teacher_pool\s*60\.0%", words)
    assert "Busy share of the two pools against steps" in text
    assert text.count("<article") == 10 and "10 of 12 recorded samples" in words


def test_nothing_is_asked_of_a_network(tmp_path: Path) -> None:
    text = report(make_run(tmp_path / "run"))
    read = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & (set(read.tags) - {"link"})
    loaded = [value or "" for name, value in read.attributes if name in ("src", "href")]
    assert all(value.startswith(("#", "data:")) for value in loaded)
    assert "url(http" not in text and "@import" not in text


def test_ids_are_unique(tmp_path: Path) -> None:
    read = Reader(report(make_run(tmp_path / "a"), make_run(tmp_path / "b")))
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = re.findall(r"#([\w-]+)\)", " ".join(value or "" for _, value in read.attributes))
    assert used and set(used) <= set(ids)  # clip paths and markers are still found


def test_what_records_hold_is_text_and_nothing_else(tmp_path: Path) -> None:
    name = "a<script>b&$x$"
    run = make_run(tmp_path / name, text=HOSTILE, divergence=HOSTILE)
    (run / FILE).write_text(prefix_failure(HOSTILE))
    read = Reader(report(run))
    assert not {"script", "img"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert read.words.count(HOSTILE) >= 10 * 3 + 2  # problem, y_o, y_r; setting, student
    assert name in read.words


def test_tokens_are_coloured_by_divergence_and_say_it_in_words() -> None:
    shown = show(0, {**sample(), "file": "f"})
    assert [token.level for token in shown.refinement.tokens] == [0, 1, 2, 3, 4, 0]
    assert [token.title for token in shown.refinement.tokens][4] == "2.500 nats"
    assert {token.level for token in shown.rollout.tokens} == {None}
    assert [token.kept for token in shown.rollout.tokens] == [True, True, True, False, True]
    assert [token.kept for token in shown.refinement.tokens] == [True] * 3 + [False] * 2 + [True]
    assert shown.largest[0] == (5, "7", 2.5)
    assert shown.rollout.tokens[2].text == "↵\n"  # a colour on white space can be seen
    assert "".join(token.text for token in shown.rollout.tokens).startswith("so x\n")
    assert shown.nll["refinement"].gap == 0.25 and shown.nll["rollout"].student is None
    assert sorted(LEVELS) == list(LEVELS)


def test_a_rollout_that_was_trained_on_has_the_colours_itself() -> None:
    labels = {name: [3.0] * 5 for name in ("divergence", "student_nll", "teacher_nll")}
    shown = show(0, {**sample(refinement=None, trained_on="rollout", labels=labels), "file": "f"})
    assert {token.level for token in shown.rollout.tokens} == {4}
    assert shown.refinement is None and shown.change is None
    assert shown.nll["rollout"].student == 3


def test_sampled_log_probabilities_are_the_nll_of_a_rollout() -> None:
    record = sample(file="f")
    record["rollout"]["logprobs"] = [-0.5, -1.5, 0.0, 0.0, -0.5]
    assert show(0, record).nll["rollout"].student == 0.5


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    n = SHOWN_TOKENS + 1234
    rewrite = {**sample()["refinement"], "token_ids": list(range(n)), "tokens": ["w "] * n}
    shown = show(0, sample(refinement=rewrite, labels=None, file="f"))
    assert len(shown.refinement.tokens) == SHOWN_TOKENS and shown.refinement.left_out == 1234
    run = make_run(tmp_path / "run")
    write_lines(run / "samples" / "step_000021.jsonl", [sample(refinement=rewrite, labels=None)])
    assert "1,234 more tokens are in the file" in report(run)


def test_samples_are_chosen_from_every_run_and_outcome() -> None:
    def of(step: int, before: bool, after: bool) -> dict[str, Any]:
        record = sample(step)
        record["rollout"]["correct"], record["refinement"]["correct"] = before, after
        return record

    first = [of(40, True, True)] * 9 + [of(20, True, False), of(20, False, True)]
    chosen = choose([first, [of(30, False, True)] * 9], 5)
    found = [
        (run, r["step"], r["rollout"]["correct"], r["refinement"]["correct"]) for run, r in chosen
    ]
    assert found == [
        *((0, 20, False, True), (1, 30, False, True), (0, 20, True, False)),
        *((0, 40, True, True), (1, 30, False, True)),
    ]


def test_several_runs_share_the_figures(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, divergence=name) for name in ("trd", "vanilla")]
    text = report(*runs)
    loss = re.search(r'<svg[^>]*aria-label="Loss against steps".*?</svg>', text, re.DOTALL)
    assert loss and "var(--run-0)" in loss[0] and "var(--run-1)" in loss[0]
    words = Reader(text).words
    assert "Settings that differ" in words and "loss.divergence" in words
    assert "train.num_steps" not in words and "run.dir" not in words


def test_runs_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / name / "run") for name in "ab"])
    assert len({run.name for run in runs}) == 2


def test_an_interrupted_run_names_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "samples")
    (run / "evaluation.jsonl").unlink()
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:9]
    (run / "metrics.jsonl").write_text("".join(kept) + '{"step": 10, "lo')
    words = Reader(report(run)).words
    for what in (
        "metrics.jsonl: 1 incomplete line left out",
        "it has not ended: 9 of 30 steps",
        "no evaluation",
        "no samples",
        "Not recorded: Held-out accuracy",
    ):
        assert what in words, what


def test_a_run_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {num_steps: 5}\n")
    words = Reader(report(tmp_path)).words
    assert "no step was recorded" in words and "it has not ended: 0 of 5" in words


@pytest.mark.parametrize(
    "broken",
    [
        {"labels": {"divergence": [1.0], "student_nll": [1.0], "teacher_nll": [1.0]}},
        {"rollout": {"token_ids": [1, 2], "tokens": ["a"]}},
        {"labels": {n: [None] * 6 for n in ("divergence", "student_nll", "teacher_nll")}},
        {"rollout": None},
        {"trained_on": None},
    ],
)
def test_a_sample_that_does_not_hold_together_is_left_out_and_counted(
    tmp_path: Path, broken: dict[str, Any]
) -> None:
    run = make_run(tmp_path / "run")
    write_lines(run / "samples" / "step_000021.jsonl", [sample(21, **broken)])
    (read,) = read_runs([run])
    assert read.missing == ["samples: 1 incomplete line left out"] and len(read.samples) == 12


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    records = [{"step": 1, "loss": None}, {"step": 2}, {"step": 3, "loss": 0.5}]
    write_lines(run / "metrics.jsonl", records)
    assert "0.5 → 0.5" in Reader(report(run)).words
    assert curves("x", "x", "y", [Line(0, [1, 2], [float("nan")] * 2)]) is None


def test_prefix_failure_has_a_section_where_it_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert 'id="prefix-failure"' not in report(run)
    (run / FILE).write_text(prefix_failure())
    text = report(run)
    section = text[text.index('id="prefix-failure"') : text.index('id="samples"')]
    words = Reader(section).words
    assert "0.25 nats before the place of error" in words and "there is a proxy" in words
    assert "bring 75.0% [37.5, 150.0] of the norm of the JSD's gradient" in words
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", section)
    assert [title.partition(",")[0] for title in titles] == [
        *("Teacher entropy", "JSD between teacher and student"),
        "Teacher&#39;s first token over its second",
    ]
    assert section.count("<svg") == 3 and "Choices in numbers" not in section
    likelihood = text[text.index('id="likelihood"') : text.index('id="time"')]
    row = "run measured: y_o of wrong y_o, teacher sees x 1.750 0.500 1.250"
    cells = [" ".join(Reader(cell).words.split()) for cell in likelihood.split("<td>")]
    assert row in " ".join(cells)
    several = report(run, make_run(tmp_path / "unmeasured"), run)
    ids = [value for name, value in Reader(several).attributes if name == "id"]
    assert len(ids) == len(set(ids)) and several.count("<h3>JSD between") == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 0}', "NaN"])
def test_a_prefix_failure_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run")
    (run / FILE).write_text(text)
    (read,) = read_runs([run])
    assert read.prefix_failure is None
    assert read.missing == [
        f"{FILE} is not one that this version of nemo_trd.prefix_failure writes"
    ]


@pytest.mark.parametrize("directory", ["empty", "absent"])
def test_a_directory_that_is_no_run_is_one_line_and_exit_2(
    tmp_path: Path, directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / directory)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nemo_trd: RUN_DIR = ") and "Fix: " in error
    assert error.count("\n") == 1 and not (tmp_path / directory / "report.html").exists()


def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run), "--output", str(tmp_path / "no" / "report.html")]) == 2
    assert capsys.readouterr().err.startswith("nemo_trd: ")


# --- in a browser ---

MEASURE = """<body><script>
const found = {};
let left = 0;
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement, width = frame.width;
  const inside = box => box.left >= -1 && box.right <= root.clientWidth + 1;
  found[width] = {
    clientWidth: root.clientWidth,
    scrollWidth: root.scrollWidth,
    title: page.title,
    sections: Object.fromEntries([...page.querySelectorAll("section")].map(
      section => [section.id, [section.innerText.trim().length, section.offsetHeight]])),
    svgs: [...page.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width),
    outside: [...page.querySelectorAll("section, figure, .card, pre, h1, h2")].filter(
      element => !inside(element.getBoundingClientRect())).length,
    columns: getComputedStyle(page.querySelector(".pair")).gridTemplateColumns.split(" ").length,
    colour: getComputedStyle(page.querySelector(".t4")).backgroundColor,
  };
  if (--left === 0) document.body.textContent = JSON.stringify(found);
}
for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  left += 1;
  frame.width = width;
  frame.height = 900;
  frame.onload = () => measure(frame);
  frame.src = "report.html";
  document.body.append(frame);
}
</script>"""


def in_browser(directory: Path) -> tuple[dict[str, Any], str]:
    """What headless Chromium makes of report.html at every width, and what it complained of."""
    chromium = shutil.which("chromium")
    if chromium is None and not os.environ.get("CI"):
        pytest.skip("Chromium is not installed: make system-packages")
    assert chromium is not None
    (directory / "measure.html").write_text(MEASURE.replace("WIDTHS", json.dumps(WIDTHS)))
    flags = ["--headless", "--disable-gpu", "--no-sandbox", "--no-first-run", "--dump-dom"]
    flags += ["--allow-file-access-from-files", "--virtual-time-budget=20000"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={directory / 'profile'}"]
    done = subprocess.run(
        [chromium, *flags, (directory / "measure.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=400,
    )
    body = re.search(r"<body>(\{.*\})</body>", done.stdout, re.DOTALL)
    assert body, done.stdout[:500] + done.stderr[-2000:]
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(body[1])), "\n".join(complaints)


@pytest.mark.parametrize("number", [1, 3])
def test_a_browser_shows_every_section_at_phone_and_desktop_width(
    tmp_path: Path, number: int
) -> None:
    """Long words, long names and hostile samples included; no sideways scrolling, no errors."""
    names = [f"{n}_a_run_with_a_name_of_more_than_a_few_words" for n in range(number)]
    runs = [make_run(tmp_path / name, text=HOSTILE + "long" * 90, top_k=name) for name in names]
    (runs[0] / FILE).write_text(prefix_failure("word" * 60))
    assert main([*map(str, runs), "--output", str(tmp_path / "report.html")]) == 0
    found, complaints = in_browser(tmp_path)
    assert complaints == ""
    for width in WIDTHS:
        seen = found[str(width)]
        assert seen["scrollWidth"] <= seen["clientWidth"] <= width, (width, seen)
        assert seen["outside"] == 0, (width, seen)
        assert list(seen["sections"]) == [*SECTIONS[:-1], "prefix-failure", "samples", "settings"]
        assert all(letters > 20 and high > 60 for letters, high in seen["sections"].values())
        assert seen["svgs"] and min(seen["svgs"]) > 250, (width, seen)
        assert seen["columns"] == (1 if width == 390 else 2)  # y_o and y_r side by side
        assert seen["colour"] == "rgb(185, 58, 11)"
        assert seen["title"].startswith("nemo_trd: ")
