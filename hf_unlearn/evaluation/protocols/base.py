"""What a benchmark consists of: sets of rows, what is measured on each, and the figures computed from that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol as Interface

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.results import Evaluation


SCORED = ("probability", "normalized_probability", "truth_ratio", "memorization", "membership", "kl")
GENERATED = ("rouge", "exact_match", "refusal", "degenerate")


class Figures(Interface):
    """Computes the figures of an evaluation; `retrained` is the same evaluation of a model retrained without D_F."""

    def __call__(self, evaluation: Evaluation, retrained: Evaluation | None) -> dict[str, Figure]: ...


@dataclass(frozen=True)
class EvaluationSet:
    """
    Rows and what is measured on them.

    Args:
        rows (`datasets.Dataset`): Rows of [`~hf_unlearn.data.to_prompt_completion`].
        measures (`tuple[str, ...]`): Names from `SCORED` (one teacher-forced pass yields all of them) and `GENERATED`
            (one generation pass yields all of them).
        max_new_tokens (`int`, *optional*, defaults to `200`): Longest generated answer.
        max_length (`int`, *optional*): Longest sequence that is scored, in tokens; not limited if `None`.
    """

    rows: datasets.Dataset
    measures: tuple[str, ...]
    max_new_tokens: int = 200
    max_length: int | None = None


@dataclass(frozen=True)
class Protocol:
    """
    A benchmark.

    Args:
        name (`str`): Its name, e.g. `"tofu"`.
        sets (`dict[str, EvaluationSet]`): Its sets by name.
        figures (`Figures`): From the columns of an evaluation to its figures.
        utility (`str`): Name of the figure that says how much of the model is left, e.g. `"model_utility"`.
        forgetting (`str`, *optional*, defaults to `"forget_probability"`): Name of a figure that falls as the model
            forgets.
        benchmarks (`Callable`, *optional*): Further figures of a model and its tokenizer, e.g. accuracies of
            [`~hf_unlearn.evaluation.protocols.harness.run_harness`]. `figures` finds them in `evaluation.figures`.
    """

    name: str
    sets: dict[str, EvaluationSet]
    figures: Figures
    utility: str
    forgetting: str = "forget_probability"
    benchmarks: Callable[[PreTrainedModel, PreTrainedTokenizerBase], dict[str, Figure]] | None = None
