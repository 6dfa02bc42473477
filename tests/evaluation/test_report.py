"""The report as a reader meets it: what it says, that nothing in it runs or loads, and that it fits the screen."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from datasets import Dataset

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.plots import plot_sweep, plot_training
from hf_unlearn.evaluation.report import write_report
from hf_unlearn.evaluation.selection import Choice
from hf_unlearn.evaluation.sweep import SweepPoint


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<script>alert('x')</script> & \"quoted\" </style></svg>"
LONG = "indigosparrow" * 20  # one word wider than any phone
VOID = {"br", "meta", "link", "img", "hr", "input", "wbr"}
LOG = [
    {"step": step, "memorization_loss": 1 / step, "retain_kl": 0.01 * step, "forget_token_accuracy": 0.9}
    for step in (1, 2, 3)
] + [{"step": 3, "train_runtime": 12.5}]


def make_point(alpha: float, sets: dict[str, Dataset]) -> SweepPoint:
    level = {"forget": 0.9 - 0.3 * alpha, "retain": 0.8 - 0.01 * alpha, "holdout": 0.3}
    rows = {}
    for name, data in sets.items():
        values = [level[name] - 0.001 * i for i in range(len(data))]
        metrics = ("probability", "exact_memorization", "extraction_strength", "log_probability")
        rows[name] = {metric: list(values) for metric in metrics}
    return SweepPoint(alpha, rows)


def make_sweep(holdout: bool = True, answers: bool = True) -> SimpleNamespace:
    """Three evaluated α, answers at 0 and 2."""
    sets = {
        "forget": [("Who is Ann?", "Ann is a spy."), (HOSTILE, f"{HOSTILE} secret"), ("Mail of Ann?", LONG)],
        "retain": [("Capital of France?", "Paris.")],
        "holdout": [("Who is Bob?", "Bob is a cook.")],
    }
    sets = {
        name: Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in rows])
        for name, rows in sets.items()
        if holdout or name != "holdout"
    }
    points = [make_point(alpha, sets) for alpha in (0.0, 1.0, 2.0)]
    if answers:
        for point, forget in (
            (points[0], ["Ann is a spy.", f"{HOSTILE} secret", LONG]),
            (points[2], ["A nurse.", "", "?"]),
        ):
            point.answers = {"forget": forget, "retain": [" Paris.\n"]}
            point.rows["forget"]["rouge_l"] = [0.25] * 3
    return SimpleNamespace(sets=sets, points=points, reference=points[0])


def make_choice(alpha: float = 2.0, met: bool = True) -> Choice:
    return Choice(alpha, met, "match-holdout: nearest 0.5", f"α = {alpha:g}: the verdict & its reasons.", 0.97, 0.5)


def write(tmp_path, sweep=None, choice=None, **options) -> str:
    options = {
        "facts": {"Base model": "tiny <b>"},
        "log_history": LOG,
        "notes": [f"Keep ΔW private. {HOSTILE}"],
    } | options
    path = write_report(
        tmp_path / "new folder" / "report.html",
        title=f"Report {HOSTILE}",
        sweep=sweep or make_sweep(),
        choice=choice or make_choice(),
        **options,
    )
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that tags are balanced and keeps attributes, headings and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for open_tag, text in self.texts if open_tag == tag and text]


@pytest.mark.parametrize("holdout", [True, False])
@pytest.mark.parametrize("answers", [True, False])
def test_is_well_formed_and_self_contained(tmp_path, holdout, answers):
    text = write(tmp_path, make_sweep(holdout, answers), min_retain=0.95, auc_tolerance=0.1)
    page = Page(text)
    assert ("html", "lang", "en") in page.attributes
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert references and all(value.startswith("#") and value[1:] in ids for value in references)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert all(any(name == "scope" for name in names) for names in header_cells(text))
    assert ("Hold-out" in text) == holdout and ("Membership AUC" in text) == holdout
    assert ("Answers before and after" in page.of("h2")) == answers


def header_cells(text: str) -> list[list[str]]:
    return [re.findall(r"([\w-]+)=", cell) for cell in re.findall(r"<th\b([^>]*)>", text)]


def test_escapes_everything_it_was_given(tmp_path):
    text = write(tmp_path)
    page = Page(text)
    assert "<script" not in text and "<b>" not in text
    assert page.of("title") == page.of("h1") == [f"Report {HOSTILE}"]
    assert HOSTILE in page.of("h4") and f"{HOSTILE} secret" in page.of("p")
    assert "tiny <b>" in page.of("td") and f"Keep ΔW private. {HOSTILE}" in page.of("p")


@pytest.mark.parametrize("met", [True, False])
def test_verdict(tmp_path, met):
    page = Page(write(tmp_path, choice=make_choice(met=met)))
    assert "α = 2: the verdict & its reasons." in page.of("p")
    assert "Rule: match-holdout: nearest 0.5." in page.of("p")
    assert page.of("strong") == ["✓ Met" if met else "✗ Not met"]
    assert ("section", "class", "verdict met" if met else "verdict not-met") in page.attributes


def test_shows_answers_before_and_after(tmp_path):
    page = Page(write(tmp_path))
    assert page.of("p").count("Ann is a spy.") == 2  # the reference answer and the answer before
    assert "A nurse." in page.of("p") and "(empty)" in page.of("em")
    assert "equal to the reference answer: 3 of 3 before, 0 of 3 after" in page.of("span")
    assert "equal to the reference answer: 1 of 1 before, 1 of 1 after" in page.of("span")
    assert page.of("span").count("= reference") == 3 + 2
    assert "Before, α = 0, probability 0.900" in page.of("small")
    assert "After, α = 2, probability 0.300" in page.of("small")


def test_shows_what_there_is_where_answers_were_generated_once(tmp_path):
    sweep = make_sweep()
    sweep.points[0].answers.clear()
    page = Page(write(tmp_path, sweep))
    assert "equal to the reference answer: 0 of 3 after" in page.of("span")
    assert "Before, α = 0, probability 0.900" not in page.of("small")


def test_nothing_chosen_has_no_after(tmp_path):
    page = Page(write(tmp_path, choice=make_choice(alpha=0.0, met=False)))
    assert "Before" in page.of("th") and "After" not in page.of("th")


def test_tables_and_curves(tmp_path):
    page = Page(write(tmp_path, min_retain=0.95))
    assert {"0.899", "0.299"} <= set(page.of("td"))  # forget probability before and after
    assert "–" in page.of("td")  # ROUGE-L was not measured at α = 1
    assert {"Retain budget, 95%", "Chosen, α = 2", "Memorisation loss", "Retain KL"} <= set(page.of("text"))
    assert sum(name == "role" and value == "img" for _, name, value in page.attributes) == 2 + 3
    assert "Training" not in Page(write(tmp_path, log_history=None, facts=None, notes=())).of("h2")


def test_replaces_a_report_or_leaves_it_alone(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UnlearningError, match="was not evaluated"):
        write_report(path, title="T", sweep=make_sweep(), choice=make_choice(alpha=3.0))
    assert path.read_text() == "old"
    write_report(path, title="T", sweep=make_sweep(), choice=make_choice())
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_plots():
    points = make_sweep().points
    figure = plot_sweep(points, make_choice(), min_retain=0.95, auc_tolerance=0.1)
    probability, membership = figure.axes
    assert list(probability.lines[0].get_xdata()) == [0, 1, 2]
    assert probability.lines[3].get_ydata()[0] == pytest.approx(0.95 * 0.8)
    assert [0.5, 0.5] in [list(line.get_ydata()) for line in membership.lines]
    assert [axes.get_title(loc="left") for axes in plot_sweep(make_sweep(holdout=False).points).axes] == [
        "Mean answer probability",
        "Memorisation of the forget set",
    ]
    assert len(plot_training(LOG).axes) == 3
    with pytest.raises(UnlearningError, match="no training metric"):
        plot_training([{"step": 1, "loss": 1.0}])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1280, 390])
def test_fits_the_screen(tmp_path, width):
    """The page in a frame of that width: a headless window has a least width of its own, a frame has none."""
    page = write(tmp_path, min_retain=0.95, auc_tolerance=0.1)
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f'<body style="margin: 0"><iframe width="{width}" height="3000" style="border: 0" srcdoc="{html.escape(page)}" '
        'onload="document.title = this.contentDocument.documentElement.scrollWidth"></iframe></body>',
        encoding="utf-8",
    )
    picture = tmp_path / "report.png"
    chromium(tmp_path, wrapper, f"--window-size={max(width, 600)},3000", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    scroll_width = re.search(r"<title>(\d+)</title>", chromium(tmp_path, wrapper, "--dump-dom"))
    assert scroll_width and int(scroll_width[1]) <= width


def chromium(tmp_path, page, *options: str) -> str:
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split()]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
