"""The report as a reader meets it: what it says, that only its own script runs, that nothing loads, and that it fits."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure, mean_figure, not_computed
from hf_unlearn.evaluation.report import FIRST_ROWS, RowText, write_report
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.selection import Choice


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)> <!-- </style></svg>"
LONG = "indigosparrow" * 20  # one word wider than any phone
VOID = {"br", "meta", "link", "img", "hr", "input", "wbr"}
LOG = [{"step": step, "memorization_loss": 1 / step, "retain_kl": 0.01 * step} for step in (1, 2, 3)]
TEXTS = {
    "forget": [
        RowText("Who is Ann?", "Ann is a spy."),
        RowText(HOSTILE, f"{HOSTILE} secret"),
        RowText("Mail of Ann?", LONG),
    ],
    "retain": [RowText("Capital of France?", "Paris.")],
    "holdout": [RowText("Who is Bob?", "Bob is a cook.")],
}
ANSWERS = {  # of the forget rows at each α
    0.0: ["Ann is a spy.", f"{HOSTILE} secret", LONG],
    1.0: ["Ann is a </script><b>baker</b>.", "none", f"{LONG}?"],
    2.0: ["A nurse.", "", "?"],
}


def make_evaluation(alpha: float | None, texts: dict[str, list[RowText]], answers: bool = True) -> Evaluation:
    """The forget probabilities of the first two rows are 0.9 and 0.899 at α = 0, and lower by 0.3 per α."""
    level = {"forget": 0.9 - 0.3 * (alpha or 0.0), "retain": 0.8 - 0.01 * (alpha or 0.0), "holdout": 0.3}
    evaluation = Evaluation("custom", alpha)
    for name, rows in texts.items():
        values = [level[name] - 0.001 * place for place in range(len(rows))]
        evaluation.rows[name] = {"row": [10 + place for place in range(len(rows))], "probability": values}
        evaluation.rows[name]["truth_ratio"] = [10.0 ** (place % 3) for place in range(len(rows))]
        evaluation.figures[f"{name}_probability"] = mean_figure(values)
        if answers and name != "holdout":
            evaluation.answers[name] = [f" {text.reference}\n" for text in rows]
    if answers and len(texts["forget"]) == 3:
        evaluation.answers["forget"] = ANSWERS[alpha or 0.0]
    evaluation.figures["membership_auc_loss"] = Figure(1 - 0.25 * (alpha or 0.0), 4)
    evaluation.figures["forget_quality"] = not_computed("no retrained log")
    return evaluation


def make_evaluations(**options) -> list[Evaluation]:
    return [make_evaluation(alpha, TEXTS, **options) for alpha in (0.0, 1.0, 2.0)]


def make_retrained() -> Evaluation:
    """Its rows are in another order, and one is missing."""
    rows = {"forget": {"row": [12, 10], "probability": [0.25, 0.125]}}
    figures = {"forget_probability": Figure(0.1875, 2, 0.125, 0.25), "forget_quality": not_computed("it is itself")}
    return Evaluation("custom", None, rows, {"forget": ["Third, retrained.", "First, retrained."]}, figures)


def make_choice(alpha: float = 2.0, met: bool = True) -> Choice:
    evidence = [
        {"alpha": each, "utility": 0.8, "utility_share": 0.9875, "within_budget": each < 2, "remark": remark}
        for each, remark in ((0.0, ""), (1.0, ""), (2.0, "over-forgotten"))
    ]
    return Choice(
        alpha=alpha,
        met=met,
        rule="match-holdout: nearest 0.5",
        verdict=f"α = {alpha:g}: the verdict & its reasons.",
        target="membership_auc_loss",
        utility="retain_probability",
        min_utility=0.95,
        auc_tolerance=0.1,
        evidence=evidence,
    )


def write(tmp_path, **options) -> str:
    options = {
        "evaluations": make_evaluations(),
        "texts": TEXTS,
        "choice": make_choice(),
        "facts": {"Base model": "tiny <b>"},
        "log_history": LOG,
        "notes": [f"Keep ΔW private. {HOSTILE}"],
    } | options
    path = write_report(tmp_path / "new folder" / "report.html", title=f"Report {HOSTILE}", **options)
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

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for open_tag, text in self.texts if open_tag == tag and text]

    @property
    def data(self) -> dict:
        return json.loads(next(text for text in self.of("script") if text.startswith("{")))


@pytest.mark.parametrize("choice", [make_choice(), None])
@pytest.mark.parametrize("retrained", [make_retrained(), None])
@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_is_well_formed_and_self_contained(tmp_path, choice, retrained, answers, several):
    evaluations = make_evaluations(answers=answers)
    evaluations = evaluations if several else evaluations[2:]
    text = write(tmp_path, evaluations=evaluations, choice=choice, retrained=retrained)
    page = Page(text)
    assert ("html", "lang", "en") in page.attributes
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "for", "list")]
    assert references and all(value.removeprefix("#") in ids for value in references)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    heads = re.findall(r"<th\b([^>]*)>", text)
    assert heads and all("scope=" in head for head in heads)
    assert ("How α was chosen" in page.of("h2")) == (choice is not None)
    assert ("Curves over α" in page.of("h2")) == several
    assert ("Reference answer" in page.of("small")) == (answers or retrained is not None)


def test_only_its_own_script_may_run(tmp_path):
    page = Page(write(tmp_path))
    script, data = page.of("script")[-1], page.of("script")[0]
    policy = next(
        value for tag, name, value in page.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    digest = base64.b64encode(hashlib.sha256(f"{script}\n".encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script
    assert "<" not in data


def test_escapes_everything_it_was_given(tmp_path):
    text = write(tmp_path)
    page = Page(text)
    assert len(page.of("script")) == text.count("<script") == 2 and "<b>" not in text and "<img" not in text
    assert page.of("title") == page.of("h1") == [f"Report {HOSTILE}"]
    assert HOSTILE in page.of("h4") and f"{HOSTILE} secret" in page.of("p")
    assert "tiny <b>" in page.of("td") and f"Keep ΔW private. {HOSTILE}" in page.of("p")
    assert page.data["sets"]["forget"]["states"][1]["answers"][0] == "Ann is a </script><b>baker</b>."


@pytest.mark.parametrize("met", [True, False])
def test_verdict(tmp_path, met):
    page = Page(write(tmp_path, choice=make_choice(met=met)))
    assert "α = 2: the verdict & its reasons." in page.of("p")
    assert "Rule: match-holdout: nearest 0.5." in page.of("p")
    (verdict,) = page.of("strong")
    assert verdict.startswith("✓ The rule is met" if met else "✗ The rule is not met: do not take this model")
    assert ("section", "class", "verdict met" if met else "verdict not-met") in page.attributes


def test_without_a_choice_it_does_not_judge(tmp_path):
    page = Page(write(tmp_path, choice=None))
    assert page.of("strong") == ["Measured only"]
    assert "Largest" in page.of("th") and page.data["chosen"] is None and page.data["start"] == 2


def test_a_choice_of_nothing_has_no_after(tmp_path):
    page = Page(write(tmp_path, choice=make_choice(alpha=0.0, met=False)))
    assert "Before" in page.of("th") and "After" not in page.of("th")
    assert page.data["start"] == page.data["chosen"] == page.data["before"] == 0


def test_headline(tmp_path):
    page = Page(write(tmp_path, retrained=make_retrained()))
    assert page.of("th")[:5] == ["n: rows", "Before", "After", "Retrained", "Forget quality"]
    assert {"0.899", "0.299", "0.188", "0.500"} <= set(page.of("td"))  # forget probability and the AUC
    assert "n = 3 / 2" in page.of("small") and "0.125–0.250" in page.of("small")
    assert page.of("small").count("not computed: no retrained log") == 2  # in the headline and among all figures


def test_evidence_and_all_figures(tmp_path):
    page = Page(write(tmp_path))
    for head in ("Answer probability, retain", "Share of α = 0", "Within budget", "Remark"):
        assert head in page.of("th")
    assert "over-forgotten" in page.of("td")
    assert page.of("td").count("98.8%") == 3 and page.of("td").count("no") == 1
    assert ("tr", "class", "chosen") in page.attributes
    assert "0.598" not in page.of("td") and "0.599" in page.of("td")  # forget probability at α = 1
    page = Page(write(tmp_path, log_history=None, facts=None, notes=()))
    assert not {"Training", "Facts", "Notes"} & set(page.of("h2"))


def test_rows_as_the_page_holds_them(tmp_path):
    data = Page(write(tmp_path, retrained=make_retrained())).data
    assert data["labels"] == ["α = 0", "α = 1", "α = 2"]
    assert (data["start"], data["chosen"], data["before"]) == (2, 2, 0)
    assert data["figures"][1][0] == "Membership AUC, loss 0.750"
    forget = data["sets"]["forget"]
    assert forget["ids"] == [10, 11, 12] and forget["rows"][0] == ["Who is Ann?", "Ann is a spy."]
    assert forget["columns"] == ["Answer probability", "Truth ratio, raw"]
    assert forget["states"][1]["values"] == [[0.6, 0.599, 0.598], [1, 10, 100]]
    assert forget["retrained"]["answers"] == ["First, retrained.", None, "Third, retrained."]  # by the ids of the rows
    assert forget["retrained"]["values"] == [[0.125, None, 0.25]]
    assert data["sets"]["holdout"]["states"][0]["answers"] is None


def test_slider_has_the_alphas_with_answers(tmp_path):
    evaluations = make_evaluations()
    evaluations[1].answers.clear()
    assert Page(write(tmp_path, evaluations=evaluations)).data["labels"] == ["α = 0", "α = 2"]
    page = Page(write(tmp_path, evaluations=make_evaluations(answers=False)))
    assert page.data["labels"] == ["α = 0", "α = 1", "α = 2"]


def test_a_model_without_alpha(tmp_path):
    page = Page(write(tmp_path, evaluations=[make_evaluation(None, TEXTS)], choice=None))
    assert "This model" in page.of("th") and "Before" not in page.of("th")
    assert page.data["labels"] == ["This model"] and page.data["before"] is None
    assert "This model, probability 0.900" in page.of("small")


def test_refuses_texts_that_do_not_fit(tmp_path):
    with pytest.raises(UnlearningError, match=r"'forget' has 2 texts but 3 entries in 'row' \(α = 0\)"):
        write(tmp_path, texts={"forget": TEXTS["forget"][:2]})


def test_replaces_a_report_or_leaves_it_alone(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    options = {"title": "T", "evaluations": make_evaluations(), "texts": TEXTS}
    with pytest.raises(UnlearningError, match="was not evaluated"):
        write_report(path, choice=make_choice(alpha=3.0), **options)
    assert path.read_text() == "old"
    write_report(path, choice=make_choice(), **options)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_is_of_a_sane_size(tmp_path):
    """400 forget and 400 retain rows at nine α, with answers of 100 letters."""
    texts = dict.fromkeys(("forget", "retain"), [RowText("q" * 90, "a" * 100)] * 400)
    evaluations = [make_evaluation(alpha / 4, texts) for alpha in range(9)]
    text = write(tmp_path, evaluations=evaluations, texts=texts)
    assert len(text) < 2_000_000
    assert text.count('<li class="card">') == 2 * FIRST_ROWS


def browse(tmp_path, text: str, width: int = 1280, sandbox: str = "", script: str = "return null"):
    """
    What `script` returns, run on the page (`page`) in a frame of that width: a headless window has a least width of its
    own, a frame has none.
    """
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<body style="margin: 0"><iframe width="{width}" height="3000" style="border: 0" {sandbox}
        srcdoc="{html.escape(text)}"></iframe><script>
        const frame = document.querySelector("iframe");
        const look = (page) => {{ {script} }};
        frame.onload = () => {{ document.title = JSON.stringify([look(frame.contentDocument)]); }};
        </script></body>""",
        encoding="utf-8",
    )
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split()]
    picture = tmp_path / "report.png"
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 600)},3000"]
    actions = ("--dump-dom", f"--screenshot={picture}")
    run = {"check": True, "capture_output": True, "text": True, "timeout": 120}
    page, _ = (subprocess.run([*command, action, wrapper.as_uri()], **run).stdout for action in actions)
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", page, re.DOTALL)[1]))[0]


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("retrained", [make_retrained(), None])
def test_fits_the_screen(tmp_path, width, retrained):
    script = """
        page.querySelectorAll("details").forEach((part) => { part.open = true; });
        return page.documentElement.scrollWidth;
    """
    assert browse(tmp_path, write(tmp_path, retrained=retrained), width, script=script) <= width


@needs_browser
def test_the_slider_changes_the_answers(tmp_path):
    script = """
        const slider = page.getElementById("alpha");
        const texts = (selector) => [...page.querySelectorAll(selector)].map((node) => node.textContent);
        const seen = () => ({
            answers: texts("details[data-set=forget] .answers li:first-child .pair p"),
            heads: texts("details[data-set=forget] .answers li:first-child .pair small"),
            empty: texts("details[data-set=forget] .answers li:nth-child(2) .pair p")[1],
            values: texts("details[data-set=forget] tbody tr:nth-child(2) td"),
            label: page.getElementById("alpha-shown").textContent,
            spoken: slider.getAttribute("aria-valuetext"),
            count: texts("details[data-set=forget] .count")[0],
            figures: page.getElementById("alpha-figures").textContent.split(" · ")[0],
        });
        const start = seen();
        slider.value = "1";
        slider.dispatchEvent(new frame.contentWindow.Event("input"));
        return { start, moved: seen(), stray: page.querySelectorAll("b, img, script").length };
    """
    seen = browse(tmp_path, write(tmp_path, retrained=make_retrained()), script=script)
    start, moved = seen["start"], seen["moved"]
    assert start["answers"] == ["Ann is a spy.", "A nurse.", "First, retrained."]
    assert start["heads"][1:] == ["After, α = 2, probability 0.300", "Retrained, probability 0.125"]
    assert start["empty"] == "(empty)"
    assert start["label"] == start["spoken"] == "α = 2 (chosen)"
    assert start["values"] == [HOSTILE, "0.299", "10.0"]
    assert start["count"] == "equal to the reference answer: 3 of 3 before, 0 of 3 after, 0 of 2 retrained"
    assert moved["answers"] == ["Ann is a spy.", "Ann is a </script><b>baker</b>.", "First, retrained."]
    assert moved["heads"][1] == "After, α = 1, probability 0.600"
    assert moved["label"] == moved["spoken"] == "α = 1"
    assert moved["values"] == [HOSTILE, "0.599", "10.0"]
    assert moved["figures"] == "Membership AUC, loss 0.750"
    assert seen["stray"] == 2  # the page's own script and its data


@needs_browser
def test_sorts_searches_and_shows_more(tmp_path):
    texts = {"forget": [RowText(f"Question {place}?", f"Answer {place}.") for place in range(50)]}
    evaluations = [make_evaluation(alpha, texts) for alpha in (0.0, 2.0)]
    script = """
        const section = page.querySelector("details[data-set=forget]");
        const rows = () => [...section.querySelectorAll("tbody th")].map((node) => Number(node.textContent));
        const cards = () => [...section.querySelectorAll(".answers h4")].map((node) => node.textContent);
        const heads = section.querySelectorAll(".values thead th");
        const seen = { first: [rows().length, cards().length] };
        heads[2].querySelector("button").click();
        seen.ascending = [rows()[0], cards()[0], heads[2].getAttribute("aria-sort"), heads[0].getAttribute("aria-sort")];
        heads[2].querySelector("button").click();
        seen.descending = [rows()[0], heads[2].getAttribute("aria-sort")];
        const [some, all] = section.querySelectorAll(".more button");
        some.click();
        seen.more = rows().length;
        all.click();
        seen.all = [rows().length, all.hidden];
        const search = page.getElementById("find");
        search.value = "answer 4";
        search.dispatchEvent(new frame.contentWindow.Event("input"));
        seen.found = [rows(), section.querySelector(".more span").textContent];
        return seen;
    """
    seen = browse(tmp_path, write(tmp_path, evaluations=evaluations, texts=texts), script=script)
    assert seen["first"] == [FIRST_ROWS, FIRST_ROWS]
    assert seen["ascending"] == [59, "Question 49?", "ascending", None]  # the last row is the least probable
    assert seen["descending"] == [10, "descending"]
    assert seen["more"] == 2 * FIRST_ROWS and seen["all"] == [50, True]
    assert sorted(seen["found"][0]) == [14, *range(50, 60)] and seen["found"][1] == "11 of 11 found rows"


@needs_browser
def test_can_be_read_without_javascript(tmp_path):
    script = """
        const texts = (selector) => [...page.querySelectorAll(selector)].map((node) => node.textContent);
        return [
            page.querySelector(".tools").hidden,
            texts("details[data-set=forget] .answers li:first-child .pair p"),
            texts("details[data-set=forget] tbody tr:first-child td"),
            page.querySelector("noscript").textContent,
        ];
    """
    text = write(tmp_path, retrained=make_retrained())
    hidden, answers, values, said = browse(tmp_path, text, sandbox='sandbox="allow-same-origin"', script=script)
    assert hidden and answers == ["Ann is a spy.", "A nurse.", "First, retrained."]
    assert values == ["Who is Ann?", "0.300", "1.000"]
    assert f"JavaScript is off: shown are the first {FIRST_ROWS} rows of each set, α = 2." in said
