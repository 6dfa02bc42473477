"""The page of an audit: one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes

from hf_unlearn.audit.auditing import Audit
from hf_unlearn.audit.findings import (
    AS_IT_IS,
    JUDGED,
    MEASURES,
    NOT_RUN,
    Comparison,
    Finding,
    Measurement,
    interval,
    number,
)
from hf_unlearn.data.formats import text_of
from hf_unlearn.evaluation.plots import BLUE, GREEN, PURPLE, VERMILLION, Panel, figure_of
from hf_unlearn.evaluation.report import FOLDER as REPORT_PAGE
from hf_unlearn.evaluation.report import page_templates, to_svg


PAGE = Path(__file__).parent / "page"
OUTPUTS = ("audit.html", "audit.json")
SERIES = {
    "forget": ("Forget", VERMILLION, "o"),
    "holdout": ("Hold-out", GREEN, "^"),
    "retain": ("Retain", BLUE, "s"),
    "trained on": ("Forget, trained on", PURPLE, "D"),
}
TONES = {"leaks": "not-met", "holds": "met"}
EXAMPLES = 5  # rows shown of an attack

PRIVACY_NOTE = (
    "Privacy: this page and audit.json contain rows of the forget set and what the model says to them. Treat them like the "
    "forget set."
)
LIMITS_NOTE = (
    "An attack that holds is one that failed as it was tried here: with these rows, these steps, these prompts. It proves "
    "nothing about attacks that were not tried."
)


def write_audit(folder: str | Path, audit: Audit) -> list[Path]:
    """
    Write `audit.html` and `audit.json`, and return their paths.

    Args:
        folder (`str` or `Path`): Where to write. It is made if missing.
        audit ([`Audit`]): What was found.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = (audit_page(audit), audit_json(audit))
    paths = [folder / name for name in OUTPUTS]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def audit_json(audit: Audit) -> str:
    """The audit as JSON; what is no finite number is `null`."""
    content = json.loads(json.dumps(audit.to_dict()), parse_constant=lambda _: None)
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def audit_page(audit: Audit) -> str:
    """The audit as a page."""
    findings = list(audit.findings.values())
    return _template().render(
        title="Audit",
        summary=summary(audit),
        tone="not-met" if audit.leaks else "measured" if _open(findings) else "met",
        findings=[_shown(finding, audit) for finding in findings],
        counts={SERIES[name][0]: len(rows) for name, rows in audit.rows.items()},
        facts=audit.facts,
        notes=[LIMITS_NOTE, PRIVACY_NOTE],
        style=(REPORT_PAGE / "page.css").read_text(encoding="utf-8"),
        own_style=(PAGE / "audit.css").read_text(encoding="utf-8"),
    )


def summary(audit: Audit) -> str:
    """How many attacks leak, hold, are unclear, or were not run."""
    verdicts = [finding.verdict for name, finding in audit.findings.items() if name != "direct"]
    counts = {verdict: verdicts.count(verdict) for verdict in ("leaks", "unclear", "holds", "measured", "not run")}
    words = {
        "leaks": ("leaks", "leak"),
        "unclear": ("is unclear", "are unclear"),
        "holds": ("holds", "hold"),
        "measured": ("was measured only", "were measured only"),
        "not run": ("was not run", "were not run"),
    }
    parts = [f"{count} {words[verdict][count > 1]}" for verdict, count in counts.items() if count]
    return f"Of {len(verdicts)} attacks {', '.join(parts)}."


def _open(findings: Sequence[Finding]) -> bool:
    """Whether nothing was found to hold, or something is open."""
    verdicts = {finding.verdict for finding in findings}
    return "unclear" in verdicts or "holds" not in verdicts


def _shown(finding: Finding, audit: Audit) -> dict[str, Any]:
    """A finding as the page shows it."""
    return {
        "id": finding.attack,
        "title": finding.title,
        "what": finding.what,
        "verdict": finding.verdict,
        "tone": TONES.get(finding.verdict, "measured"),
        "words": finding.words,
        "rule": finding.rule,
        "notes": finding.notes,
        "comparisons": [_comparison_line(each) for each in finding.comparisons],
        "lines": _lines(finding.measurements),
        "plots": [to_svg(figure_of([panel]), f"{finding.attack}{n}") for n, panel in enumerate(panels(finding))],
        "examples": _examples(finding, audit),
        "was_run": finding.verdict != NOT_RUN,
    }


def _comparison_line(each: Comparison) -> dict[str, str]:
    return {
        "variant": each.variant,
        "measure": MEASURES[each.measure] if each.measure in JUDGED else f"AUC by {MEASURES[each.measure]}",
        "attacked": number(each.attacked.value),
        "reference": f"{number(each.reference.value)} ({each.against})",
        "gain": number(each.gain.value),
        "interval": interval(each.gain),
        "needed": number(each.needed),
        "outcome": each.outcome,
    }


def _lines(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One line a variant and set, with a cell a measure."""
    names = [name for name in MEASURES if any(name in each.values for each in measurements)]
    lines = []
    for each in (each for each in measurements if each.positions):
        cells = {MEASURES[name]: None for name in names}
        for name in each.values:
            figure = each.figure(name)
            cells[MEASURES[name]] = {"value": number(figure.value), "interval": interval(figure)}
        lines.append(
            {
                "variant": each.variant,
                "set": SERIES[each.set][0],
                "n": len(each.positions),
                "cells": list(cells.items()),
            }
        )
    return lines


def _examples(finding: Finding, audit: Audit) -> list[dict[str, str]]:
    """The rows that an attack got most of, with what the model said as it is and under the attack."""
    direct = audit.findings["direct"].measurements
    before = next((each.answers for each in direct if each.set == "forget" and each.variant == AS_IT_IS), None)
    judged = [each for each in finding.measurements if each.set == "forget" and each.answers]
    judged = [each for each in judged if each.variant != AS_IT_IS or finding.attack == "direct"]
    best: dict[int, tuple[float, str, str]] = {}
    for each in judged:
        for score, place, answer in zip(each.values["rouge_l_recall"], each.positions, each.answers, strict=True):
            if place not in best or score > best[place][0]:
                best[place] = (score, each.variant, answer)
    places = sorted(best, key=lambda place: (-best[place][0], place))[:EXAMPLES]
    rows = audit.rows["forget"]
    return [
        {
            "prompt": text_of(rows[place].prompt) or "(no question)",
            "reference": rows[place].answer,
            "before": before[place] if before and finding.attack != "direct" else "",
            "variant": variant,
            "answer": answer or "(empty)",
            "score": number(score),
        }
        for place, (score, variant, answer) in ((place, best[place]) for place in places)
    ]


# ---- Plots ----


def panels(finding: Finding) -> list[Panel]:
    """A curve where the variants lie on an axis, else a group of points a variant; the AUC of membership by itself."""
    if not finding.measurements:
        return []
    if finding.attack == "membership":
        return [_auc_panel(finding.comparisons)]
    if finding.axis is not None:
        return [_curve_panel(finding)]
    measures = [name for name in JUDGED if any(name in each.values for each in finding.measurements)]
    return [_points_panel(finding, measure) for measure in measures]


def _curve_panel(finding: Finding) -> Panel:
    def draw(axes: Axes) -> None:
        for name, (label, color, marker) in SERIES.items():
            of_set = [each for each in finding.measurements if each.set == name and each.x is not None]
            if of_set:
                figures = [each.figure("probability") for each in of_set]
                xs = [each.x for each in of_set]
                style = {"color": color, "marker": marker, "label": label, "clip_on": False, "zorder": 3}
                axes.plot(xs, [figure.value for figure in figures], **style)
                bounds = [[_or(getattr(f, bound), f.value) for f in figures] for bound in ("low", "high")]
                axes.fill_between(xs, *bounds, color=color, alpha=0.15, linewidth=0)
        for each in finding.measurements:
            if each.set == "forget" and each.x is None:  # seen beside the curve
                level = each.figure("probability").value
                axes.axhline(level, color=VERMILLION, linestyle="--", linewidth=1.2, label=f"Forget, {each.variant}")
        axes.set(title=f"{finding.title}: answer probability", xlabel=finding.axis, ylabel="Probability", ylim=(0, 1))
        axes.set_xlim(left=0)
        _legend(axes)

    return draw


def _points_panel(finding: Finding, measure: str) -> Panel:
    found = [each for each in finding.measurements if measure in each.values and each.positions]
    variants = list(dict.fromkeys(each.variant for each in found))

    def draw(axes: Axes) -> None:
        present = [name for name in SERIES if any(each.set == name for each in found)]
        for place, name in enumerate(present):
            label, color, marker = SERIES[name]
            of_set = [each for each in found if each.set == name]
            xs = [variants.index(each.variant) + 0.16 * (place - (len(present) - 1) / 2) for each in of_set]
            _with_intervals(axes, xs, [each.figure(measure) for each in of_set], color, marker, label)
        axes.set_xticks(range(len(variants)), variants)
        axes.set_xlim(-0.6, len(variants) - 0.4)
        name = MEASURES[measure]
        title = name[0].upper() + name[1:]
        axes.set(title=f"{finding.title}: {name}", ylabel=title, ylim=(0, 1))
        _legend(axes)

    return draw


def _auc_panel(comparisons: Sequence[Comparison]) -> Panel:
    def draw(axes: Axes) -> None:
        _with_intervals(axes, range(len(comparisons)), [each.attacked for each in comparisons], VERMILLION, "o", "AUC")
        centre, tolerance = comparisons[0].reference.value, comparisons[0].needed
        axes.axhline(centre, color=GREEN, linewidth=1.2, label=comparisons[0].against.capitalize())
        axes.axhspan(centre - tolerance, centre + tolerance, color=GREEN, alpha=0.15, linewidth=0, label="Tolerance")
        axes.set_xticks(range(len(comparisons)), [MEASURES[each.measure] for each in comparisons])
        axes.set_xlim(-0.6, len(comparisons) - 0.4)
        axes.set(title="Membership inference: AUC", ylabel="AUC", ylim=(0, 1))
        _legend(axes)

    return draw


def _with_intervals(
    axes: Axes, xs: Sequence[float], figures: Sequence[Any], color: str, marker: str, label: str
) -> None:
    values = [figure.value for figure in figures]
    below = [figure.value - _or(figure.low, figure.value) for figure in figures]
    above = [_or(figure.high, figure.value) - figure.value for figure in figures]
    style = {"color": color, "marker": marker, "linestyle": "", "capsize": 3, "label": label, "zorder": 3}
    axes.errorbar(xs, values, [below, above], clip_on=False, ecolor=color, **style)


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _legend(axes: Axes) -> None:
    """Below the axes, where it covers nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.04, -0.19), ncols=2, handlelength=1.9, columnspacing=1.4)


@cache
def _template() -> jinja2.Template:
    return page_templates(PAGE).get_template("audit.html.jinja")
