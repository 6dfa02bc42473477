"""Evaluating θ_for = θ_ref − α·ΔW for many α on one loaded model: the live adapter is rescaled, nothing is merged."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import metrics
from hf_unlearn.evaluation.generation import generate_answers
from hf_unlearn.evaluation.scoring import score_rows
from hf_unlearn.extrapolation.live import extrapolated


ROW_METRICS = {
    "probability": metrics.probability,
    "exact_memorization": metrics.exact_memorization,
    "extraction_strength": metrics.extraction_strength,
}


@dataclass
class SweepPoint:
    """
    The model at one α.

    Args:
        alpha (`float`): Extrapolation strength; 0 is the reference.
        rows (`dict[str, dict[str, list[float]]]`): Per set and metric, the value of each row; `log_probability` is the
            mean answer log-probability, `rouge_l` is there where answers were generated.
        answers (`dict[str, list[str]]`): Per set, the generated answers, where they were generated.
    """

    alpha: float
    rows: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)

    def mean(self, set_name: str, metric: str) -> float:
        """Mean of a metric over the rows of a set."""
        return float(np.mean(self.rows[set_name][metric]))

    @property
    def membership_auc(self) -> float | None:
        """AUC of the forget rows against the hold-out rows by mean answer log-probability; `None` without hold-out."""
        if "holdout" not in self.rows:
            return None
        return metrics.membership_auc(self.rows["forget"]["log_probability"], self.rows["holdout"]["log_probability"])

    def summary(self) -> dict[str, float]:
        """One flat row: `alpha`, `<set>_<metric>` means, and `membership_auc` where there is a hold-out set."""
        row: dict[str, float] = {"alpha": self.alpha}
        for set_name, values in self.rows.items():
            row |= {f"{set_name}_{name}": self.mean(set_name, name) for name in values if name != "log_probability"}
        if self.membership_auc is not None:
            row["membership_auc"] = self.membership_auc
        return row


class Sweep:
    """
    Evaluates one adapter at any α, each α once.

    Args:
        model ([`~peft.PeftModel`]):
            The base model with the memorising adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        sets (`dict[str, datasets.Dataset]`):
            Tokenised sets ([`~hf_unlearn.data.tokenize_rows`]) under the names `"forget"`, `"retain"` and, optionally,
            `"holdout"`: rows of the same kind as the forget set that the model never saw.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows in a forward pass.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest generated answer.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        sets: dict[str, datasets.Dataset],
        batch_size: int = 16,
        max_new_tokens: int = 64,
        progress: bool = True,
    ) -> None:
        for name in ("forget", "retain"):
            if name not in sets:
                raise UnlearningError(f"A sweep needs a {name} set; got {sorted(sets)}.")
        for name, rows in sets.items():
            if not len(rows):
                raise UnlearningError(f"The {name} set has no row to evaluate.")
        self.model = model
        self.tokenizer = tokenizer
        self.sets = sets
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.progress = progress
        self._points: dict[float, SweepPoint] = {}

    @property
    def points(self) -> list[SweepPoint]:
        """Everything evaluated so far, by rising α."""
        return [self._points[alpha] for alpha in sorted(self._points)]

    @property
    def reference(self) -> SweepPoint:
        """The untouched model (α = 0)."""
        return self.evaluate(0.0)

    def evaluate(self, alpha: float) -> SweepPoint:
        """Score all sets at `alpha`, or return what was scored before."""
        alpha = float(alpha)
        if alpha not in self._points:
            point = SweepPoint(alpha)
            with extrapolated(self.model, alpha):
                for name, rows in self.sets.items():
                    label = f"α = {alpha:g}: scoring {name} rows" if self.progress else None
                    scores = score_rows(self.model, rows, self.tokenizer.eos_token_id, self.batch_size, label)
                    point.rows[name] = {
                        metric: [function(row) for row in scores] for metric, function in ROW_METRICS.items()
                    }
                    point.rows[name]["log_probability"] = [
                        float(row.log_probs.mean(dtype=np.float64)) for row in scores
                    ]
            self._points[alpha] = point
        return self._points[alpha]

    def generate(self, alpha: float, sets: Iterable[str] = ("forget", "retain")) -> SweepPoint:
        """Generate the answers of some sets at `alpha`, and their ROUGE-L recall."""
        point = self.evaluate(alpha)
        with extrapolated(self.model, alpha):
            for name in sets:
                if name in point.answers:
                    continue
                rows = self.sets[name]
                label = f"α = {alpha:g}: answering {name} rows" if self.progress else None
                answers = generate_answers(
                    self.model, rows["prompt"], self.tokenizer, self.max_new_tokens, self.batch_size, label
                )
                point.answers[name] = answers
                point.rows[name]["rouge_l"] = [
                    metrics.rouge_l_recall(text_of(reference), answer)
                    for reference, answer in zip(rows["completion"], answers, strict=True)
                ]
        return point

    def run(self, alphas: Iterable[float], generate: bool = False) -> list[SweepPoint]:
        """
        Evaluate the reference and a grid of α.

        Args:
            alphas (iterable of `float`): Extrapolation strengths.
            generate (`bool`, *optional*, defaults to `False`): Whether to generate answers at each of them too.
        """
        grid = sorted({0.0, *map(float, alphas)})
        for alpha in grid:
            self.evaluate(alpha)
            if generate:
                self.generate(alpha)
        return [self._points[alpha] for alpha in grid]

    def save(self, output_dir: str | Path) -> None:
        """Write `sweep.csv` (one line an α) and `sweep.json` (per-row values and answers besides)."""
        folder = Path(output_dir)
        summaries = [point.summary() for point in self.points]
        columns = list(dict.fromkeys(name for summary in summaries for name in summary))
        with open(folder / "sweep.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(summaries)
        content = [
            {"alpha": point.alpha, "summary": summary, "rows": point.rows, "answers": point.answers}
            for point, summary in zip(self.points, summaries, strict=True)
        ]
        (folder / "sweep.json").write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def text_of(part: str | list[dict[str, Any]]) -> str:
    """The plain text of a prompt or completion: itself, or the content of its last message."""
    return part if isinstance(part, str) else part[-1]["content"]
