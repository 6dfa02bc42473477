"""
Tables and plots of the study, from its raw results.

    python benchmarks/study/report.py

Reads benchmarks/study/results, writes the plots to docs/figures and the tables into docs/study.md, between the comments
that mark their places.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from best import MIN_UTILITY, auc_gap, best, quality, share, within
from matplotlib import pyplot as plt
from methods import METHODS


matplotlib.use("Agg")

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "study.md"
LEVEL = 0.05
COLUMNS = {
    "utility": "utility",
    "forget_truth_ratio": "truth ratio",
    "forget_probability": "probability",
    "forget_rouge_l_recall": "ROUGE-L",
    "forget_extraction_strength": "extraction strength",
    "forget_degenerate_rate": "degenerate",
    "membership_auc_loss": "AUC",
    "paraphrased_rouge_l_recall": "ROUGE-L, paraphrased",
}


class Study:
    """The results of one setting."""

    def __init__(self, setting: str) -> None:
        self.setting = setting
        folder = RESULTS / setting
        self.target, self.retrained = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("target", "retrained")
        )
        self.runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for path in sorted(folder.glob("*-[0-9].json")):
            result = json.loads(path.read_text())
            self.runs[result["method"]].append(result)

    def share(self, figures: dict[str, Any]) -> float:
        """Share of the target's utility."""
        return share(figures, self.target)

    def best(self, run: dict[str, Any]) -> dict[str, Any]:
        """The point that stands for a run."""
        return best(run["points"], self.target, self.retrained)

    def auc_gap(self, figures: dict[str, Any]) -> float:
        """How far the membership AUC is from the retrained model's."""
        return auc_gap(figures, self.retrained)

    def within(self, run: dict[str, Any]) -> list[dict[str, Any]]:
        """The points of a run that keep the budget, the target among them."""
        return within(run["points"], self.target)

    def least_auc_gap(self, run: dict[str, Any]) -> float | None:
        """That of the nearest point that passes the test of forget quality within the budget; `None` where none does."""
        return min((self.auc_gap(at) for at in self.within(run) if quality(at) > LEVEL), default=None)

    def least_probability(self, run: dict[str, Any]) -> float:
        """The least forget probability within the budget."""
        return min(figures["forget_probability"] for figures in self.within(run))

    def ranking(self) -> list[str]:
        """Methods by the median of their best forget quality, then by the AUC, then by what is left of the forget rows."""

        def median(name: str, of: Callable[[dict[str, Any]], float]) -> float:
            return statistics.median(of(self.best(run)) for run in self.runs[name])

        return sorted(
            self.runs,
            key=lambda name: (
                -median(name, quality),
                median(name, self.auc_gap),
                median(name, lambda figures: figures["forget_probability"]),
            ),
        )


def seconds(run: dict[str, Any], at: dict[str, Any]) -> float:
    """CPU seconds of the training; of a baseline up to the step that is reported."""
    is_baseline = METHODS[run["method"]].kind == "baseline"
    return run["seconds"] * (at["strength"] / run["steps"] if is_baseline else 1)


def p_value(value: float) -> str:
    """A p-value in a table."""
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}".replace("-", "−")


def spread(values: list[float], form: Any = "{:.2f}".format) -> str:
    """Median and range over the seeds."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return "–"
    median = form(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({form(min(values))} to {form(max(values))})"


def main_table(study: Study) -> str:
    """Every method at its best point."""
    lines = [
        "| method | seeds | strength | forget quality | "
        + " | ".join(COLUMNS.values())
        + " | AUC gap where p > .05 | training, CPU s |",
        "|" + "---|" * (len(COLUMNS) + 6),
    ]
    for name, figures in {"target": study.target, "retrained": study.retrained}.items():
        cells = [f"*{name}*", "", "", "", *(f"{figures[column]:.3f}" for column in COLUMNS), "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    for name in study.ranking():
        runs = study.runs[name]
        chosen = [study.best(run) for run in runs]
        cells = [
            f"**{name}**" if METHODS[name].kind != "baseline" else name,
            str(len(runs)),
            spread([figures["strength"] for figures in chosen], "{:.3g}".format),
            spread([quality(figures) for figures in chosen], p_value),
            *(spread([figures[column] for figures in chosen], "{:.3f}".format) for column in COLUMNS),
            spread([study.least_auc_gap(run) for run in runs]),
            spread([seconds(run, at) for run, at in zip(runs, chosen, strict=True)], "{:.0f}".format),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pairs_table(study: Study) -> str:
    """Matched pairs: the same seed, one thing changed."""
    lines = [
        "| changed | against | seeds | better in | forget quality | against | least probability | against |",
        "|" + "---|" * 8,
    ]
    for name in study.runs:
        other = METHODS[name].compare
        if other not in study.runs:
            continue
        others = {run["seed"]: run for run in study.runs[other]}
        matched = [(run, others[run["seed"]]) for run in study.runs[name] if run["seed"] in others]
        if not matched:
            continue
        sides = [
            [(quality(study.best(run)), study.least_probability(run)) for run in side]
            for side in zip(*matched, strict=True)
        ]
        better = sum((mine[0], -mine[1]) > (theirs[0], -theirs[1]) for mine, theirs in zip(*sides, strict=True))
        cells = [name, other, str(len(matched)), str(better)]
        cells += [spread([figures[0] for figures in side], p_value) for side in sides]
        cells += [spread([figures[1] for figures in side], "{:.3f}".format) for side in sides]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rules_table(study: Study) -> str:
    """What each rule for α finds, against the best in hindsight."""
    rules = ("match-retrain", "match-holdout", "utility-budget")
    lines = ["| method | best in hindsight | " + " | ".join(rules) + " |", "|" + "---|" * (len(rules) + 2)]
    for name in study.ranking():
        runs = [run for run in study.runs[name] if "rules" in run]
        if not runs:
            continue
        cells = [name, spread([quality(study.best(run)) for run in runs], p_value)]
        for rule in rules:
            chosen = [
                next((quality(p) for p in [study.target, *run["points"]] if p["strength"] == run["rules"][rule]), None)
                for run in runs
            ]
            cells.append(spread(chosen, p_value))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attacks_table(study: Study) -> str:
    """What is left for someone who tries."""
    folder = RESULTS / study.setting / "attacks"
    if not folder.exists():
        return ""
    lines = [
        "| method | seed | as it is | 8 bits | 4 bits | walked back | relearned: 1 step | 2 | 5 | 10 |",
        "|" + "---|" * 10,
    ]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        cells = [result.get("method", path.stem), str(result.get("seed", "–"))]
        for name in ("as it is", "8 bits", "4 bits", "walked back"):
            cells.append(f"{result[name]['forget_probability']:.3f}" if name in result else "–")
        cells += [f"{step['probability']:.3f}" for step in result["relearned"] if step["step"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(study: Study, path: Path, shown: int = 7) -> None:
    """Forget quality against utility, and within the budget against the membership AUC; the leaders in colour."""
    figure, (trade_off, membership) = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True, layout="constrained")
    for rank, name in reversed(list(enumerate(study.ranking()))):
        style = {
            "color": f"C{rank}" if rank < shown else "0.8",
            "linewidth": 1.5 if rank < shown else 0.8,
            "marker": "o" if METHODS[name].kind != "baseline" else "x",
            "markersize": 4,
        }
        for index, run in enumerate(study.runs[name]):
            points = [study.target, *run["points"]]
            label = name if rank < shown and index == 0 else None
            trade_off.plot([study.share(p) for p in points], [_shown(p) for p in points], label=label, **style)
            kept = study.within(run)
            membership.plot(
                [p["membership_auc_loss"] for p in kept],
                [_shown(p) for p in kept],
                **style | {"linewidth": 0, "zorder": 3 if rank < shown else 1},
            )
    for axes in (trade_off, membership):
        axes.axhline(LEVEL, color="black", linewidth=0.8, linestyle="--")
    trade_off.axvline(MIN_UTILITY, color="black", linewidth=0.8, linestyle="--")
    trade_off.set(
        yscale="log", xlim=(0.65, 1.03), xlabel="utility, share of the target's", ylabel="forget quality (KS p)"
    )
    trade_off.text(0.655, LEVEL * 1.2, "cannot be told from retrained", fontsize=8)
    trade_off.legend(fontsize=8, loc="lower left", title="the best methods, in order", reverse=True)
    retrained = study.retrained["membership_auc_loss"]
    membership.axvline(retrained, color="black", linewidth=0.8, linestyle=":")
    beside = {"rotation": 90, "ha": "right", "va": "bottom", "transform": membership.get_xaxis_transform()}
    membership.text(retrained - 0.01, 0.05, "the retrained model's", fontsize=8, **beside)
    membership.set(
        xlim=(-0.03, 1.03),
        xlabel="membership AUC (1: forget rows look learned, 0: shunned)",
        title="with at least 98 % of the utility",
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _shown(figures: dict[str, Any]) -> float:
    return max(quality(figures), 1e-20)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for setting in ("small", "smollm2"):
        if not (RESULTS / setting / "target.json").exists():
            continue
        study = Study(setting)
        if not study.runs:
            continue
        plot(study, ROOT / "docs" / "figures" / f"study-{setting}.png")
        for table in (main_table, pairs_table, rules_table, attacks_table):
            mark = f"{setting} {table.__name__.removesuffix('_table')}"
            if f"<!-- {mark} -->" not in page:
                continue
            before, _, rest = page.partition(f"<!-- {mark} -->\n")
            page = f"{before}<!-- {mark} -->\n{table(study)}\n{rest[rest.index('<!-- end -->') :]}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
