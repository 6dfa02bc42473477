"""The page of an audit as a reader meets it: what it says, that nothing runs or loads, and that it fits."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from hf_unlearn.audit import Audit, AuditOptions, Finding, Measurement, write_audit
from hf_unlearn.audit.case import Row
from hf_unlearn.audit.findings import compare, in_words
from hf_unlearn.audit.membership import judge_auc
from hf_unlearn.audit.report import summary
from hf_unlearn.evaluation.figures import Figure


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)> <!-- </style></svg>"
LONG = "indigosparrow" * 20  # one word wider than any phone


def measured(variant: str, name: str, level: float, x: float | None = None) -> Measurement:
    values = {"probability": [level, level - 0.1, level - 0.2], "rouge_l_recall": [level - 0.2, level - 0.1, level]}
    return Measurement(variant, name, [0, 1, 2], values, [f"{variant}: {HOSTILE}", LONG, ""], x)


def finding(attack: str, title: str, variants: dict[str, float], axis: str | None = None) -> Finding:
    """Forget rows at these levels, hold-out rows always at .3."""
    found, comparisons = [], []
    for place, (variant, level) in enumerate(variants.items()):
        x = float(place) if axis else None
        found += [measured(variant, "forget", level, x), measured(variant, "holdout", 0.3, x)]
        pair = (found[-2].values["probability"], found[-1].values["probability"])
        comparisons.append(compare(variant, "probability", *pair, "hold-out rows", margin=0.1, paired=False))
    verdict = "leaks" if any(each.outcome == "leaks" for each in comparisons) else "holds"
    rule = f"The rule of {title}. {HOSTILE}"
    words = in_words(comparisons)
    return Finding(attack, title, "What it does.", verdict, words, rule, comparisons, found, ["A note."], axis)


def make_audit() -> Audit:
    auc = judge_auc("loss", Figure(0.8, 6, 0.4, 1.0), 0.5, "no difference", 0.1)
    places = [0, 1, 2]
    scores = [Measurement("as it is", name, places, {"loss": [1.0, 2.0, 3.0]}) for name in ("forget", "holdout")]
    findings = [
        finding("direct", "As it is", {"as it is": 0.3}),
        finding("relearning", "Relearning", {"0 steps": 0.3, "1 step": 0.5, "2 steps": 0.9}, "Optimiser step"),
        finding("quantisation", "Quantisation", {"as it is": 0.3, "8 bits": 0.3}),
        Finding("system_prompt", "System-prompt leakage", "What it does.", "not run", "Not run: no chat template."),
        Finding("membership", "Membership inference", "What.", "unclear", "AUC.", "Rule.", [auc], scores),
    ]
    rows = {
        name: [Row(HOSTILE, "", HOSTILE, None), Row("q", "", LONG, None), Row("q", "", "a", None)] for name in SETS
    }
    return Audit({each.attack: each for each in findings}, AuditOptions(), rows, {"Audited": "tiny <b>"})


SETS = ("forget", "retain", "holdout")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return write_audit(tmp_path_factory.mktemp("audit"), make_audit())[0].read_text(encoding="utf-8")


def test_summary_counts_attacks_not_the_model_as_it_is():
    assert summary(make_audit()) == "Of 4 attacks 1 leaks, 1 is unclear, 1 holds, 1 was not run."


def test_nothing_runs_and_nothing_loads(page):
    assert "default-src 'none'" in page and "<script" not in page
    assert not re.search(r"\b(?:src|href)=\"(?!#)", page)
    assert "url(" not in re.sub(r"url\(#", "", page) and "@import" not in page
    assert "<img" not in page and "<b>" not in page  # of the texts


def test_json_survives_what_is_no_number(tmp_path):
    audit = make_audit()
    audit.findings["direct"].measurements[0].values["probability"][0] = float("nan")
    content = json.loads(write_audit(tmp_path, audit)[1].read_text(encoding="utf-8"))
    rows = content["attacks"]["direct"]["rows"][0]
    assert rows["values"]["probability"][0] is None and rows["values"]["probability"][1] == pytest.approx(0.2)


def browse(tmp_path, text: str, width: int, script: str):
    """What `script` returns, run on the page (`page`) in a frame of that width, in which scripts of its own are off."""
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<body style="margin: 0"><iframe width="{width}" height="3000" style="border: 0"
        sandbox="allow-same-origin" srcdoc="{html.escape(text)}"></iframe><script>
        const frame = document.querySelector("iframe");
        const look = (page) => {{ {script} }};
        frame.onload = () => {{ document.title = JSON.stringify([look(frame.contentDocument)]); }};
        </script></body>""",
        encoding="utf-8",
    )
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet.split()]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 600)},3000", "--dump-dom"]
    run = {"check": True, "capture_output": True, "text": True, "timeout": 120}
    dumped = subprocess.run([*command, wrapper.as_uri()], **run).stdout
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dumped, re.DOTALL)[1]))[0]


LOOK = """
    page.querySelectorAll("details").forEach((part) => { part.open = true; });
    const texts = (selector) => [...page.querySelectorAll(selector)].map((node) => node.textContent.trim());
    return {
        width: page.documentElement.scrollWidth,
        summary: texts("header .verdict strong")[0],
        verdicts: texts("#overview td .tag"),
        titles: texts("#overview tbody th"),
        sections: [...page.querySelectorAll("section.attack")].map((node) => node.id),
        links: [...page.querySelectorAll("a")].every((a) => page.querySelector(a.getAttribute("href"))),
        curves: page.querySelectorAll("#relearning svg").length,
        points: page.querySelectorAll("#quantisation svg").length,
        best: texts("#relearning .example .pair div:last-child p")[0],
        outcome: texts("#relearning > .scroll tbody tr:nth-child(3) td:last-child")[0],
        stray: page.querySelectorAll("script, img, b").length,
        ids: [...page.querySelectorAll("[id]")].map((node) => node.id),
    };
"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(tmp_path, page, width):
    seen = browse(tmp_path, page, width, LOOK)
    assert seen["width"] <= width
    assert seen["summary"] == "Of 4 attacks 1 leaks, 1 is unclear, 1 holds, 1 was not run."
    assert seen["verdicts"] == ["holds", "leaks", "holds", "not run", "unclear"]
    assert seen["titles"][3] == "System-prompt leakage"
    assert seen["sections"] == ["direct", "relearning", "quantisation", "membership"] and seen["links"]
    assert (seen["curves"], seen["points"], seen["stray"]) == (1, 2, 0)
    assert seen["best"] == "(empty)"  # the row with the highest score of the last step
    assert seen["outcome"] == "leaks"
    assert len(set(seen["ids"])) == len(seen["ids"])
