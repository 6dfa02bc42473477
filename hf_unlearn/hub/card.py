"""The model card of a forget model or forget adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.logs import OWN_LOG, find_log
from hf_unlearn.evaluation.results import Evaluation


TAGS = ["unlearning", "model-extrapolation", "hf_unlearn"]
EVAL_RESULTS_FILE = ".eval_results/hf_unlearn.yaml"
BENCHMARKS = {  # protocol, or a figure of it: its data set on the Hub
    "tofu": "locuslab/TOFU",
    "wmdp": "cais/wmdp",
    "mmlu": "cais/mmlu",
}


class BeforeAfter:
    """
    The figures of an evaluation before and after forgetting, read from what `hf-unlearn eval` or `sweep` wrote.

    Args:
        path (`str` or `Path`): `evaluation.json`, or the folder that holds it.
        alpha (`float`): The α of the result. The evaluation at this α is "after", the one at α = 0 "before"; a single
            evaluation of a model as it is is "after".

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: there is no evaluation of this α.
    """

    def __init__(self, path: str | Path, alpha: float) -> None:
        path = find_log(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            entries = content["evaluations"]
            evaluations = [Evaluation.from_dict(entry) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise UnlearningError(
                f"--results {path} is not what `hf-unlearn eval` and `sweep` write ({error!r}). Pass their {OWN_LOG}."
            ) from error
        by_alpha = {evaluation.alpha: evaluation for evaluation in evaluations}
        after = by_alpha.get(alpha) or by_alpha.get(None)
        if after is None:
            found = ", ".join(f"{value:g}" for value in by_alpha)
            raise UnlearningError(
                f"--results {path} has no evaluation at α = {alpha:g}, only at {found}. Evaluate the result with "
                "`hf-unlearn eval`, or write it at one of these α."
            )
        self.protocol = after.protocol
        self.after = {name: figure for name, figure in after.figures.items() if figure.value is not None}
        before = by_alpha.get(0)
        self.before: dict[str, Figure] = {} if before is None else before.figures
        choice = content.get("choice")
        self.choice: dict[str, Any] | None = choice if choice and choice["alpha"] == alpha else None

    def table(self) -> list[tuple[str, int, str, str]]:
        """For each figure its name, number of rows, and value with interval before and after."""
        return [
            (name, figure.n, with_interval(self.before.get(name)), with_interval(figure))
            for name, figure in self.after.items()
        ]

    def eval_results(self) -> list[EvalResult]:
        """The figures after forgetting for the `model-index`; those before are arguments of the metric."""
        return [
            EvalResult(
                task_type="text-generation",
                task_name="Unlearning",
                dataset_type=self._dataset(name) or self.protocol,
                dataset_name=f"protocol {self.protocol}",
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=figure.value,
                metric_args=_arguments(figure, self.before.get(name)),
            )
            for name, figure in self.after.items()
        ]

    def entries(self) -> list[EvalResultEntry]:
        """The figures in the form of `.eval_results/*.yaml`, which has room for benchmarks on the Hub only."""
        return [
            EvalResultEntry(
                dataset_id=dataset,
                task_id=name,
                value=figure.value,
                notes="; ".join(
                    f"{when} unlearning: {with_interval(value)}, {value.n} rows"
                    for when, value in (("before", self.before.get(name)), ("after", figure))
                    if value is not None and value.value is not None
                ),
            )
            for name, figure in self.after.items()
            if (dataset := self._dataset(name)) is not None
        ]

    def _dataset(self, figure: str) -> str | None:
        return BENCHMARKS.get(figure, BENCHMARKS.get(self.protocol))


def with_interval(figure: Figure | None) -> str:
    """A figure as the card writes it: its value and, where there is one, its 95 % interval."""
    if figure is None or figure.value is None:
        return "–"
    interval = f" [{figure.low:.3g}, {figure.high:.3g}]" if figure.low is not None else ""
    return f"{figure.value:.3g}{interval}"


def _arguments(after: Figure, before: Figure | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"rows": after.n}
    if after.low is not None:
        arguments["interval_95"] = [after.low, after.high]
    if before is not None and before.value is not None:
        arguments["before"] = before.value
        if before.low is not None:
            arguments["before_interval_95"] = [before.low, before.high]
    return arguments


class UnlearningCardData(ModelCardData):
    """
    Metadata of the card: those of [`~huggingface_hub.ModelCardData`], with the tags of unlearning and the relation to the
    base model.

    Args:
        base_model (`str`, *optional*): Hub id of the base.
        base_model_relation (`str`, *optional*): `"finetune"` of a model, `"adapter"` of an adapter.
        kwargs: Further metadata, see [`~huggingface_hub.ModelCardData`].
    """

    def __init__(
        self, *, base_model: str | None = None, base_model_relation: str | None = None, **kwargs: Any
    ) -> None:
        tags = [*TAGS, *(["lora"] if base_model_relation == "adapter" else []), *kwargs.pop("tags", [])]
        defaults = {
            "library_name": "peft" if base_model_relation == "adapter" else "transformers",
            "pipeline_tag": "text-generation",
        }
        super().__init__(
            base_model=base_model, base_model_relation=base_model_relation, tags=tags, **defaults | kwargs
        )

    def _to_dict(self, data_dict: dict[str, Any]) -> None:
        results, name = data_dict.pop("eval_results"), data_dict.pop("model_name")
        if results:
            data_dict["model-index"] = eval_results_to_model_index(name, results)


class UnlearningModelCard(ModelCard):
    """A model card that says what was forgotten, how far, at what cost, and who must not have it."""

    card_data_class = UnlearningCardData
    default_template_path = Path(__file__).parent / "card_template.md"


def eval_results_yaml(entries: list[EvalResultEntry]) -> bytes:
    """Content of `.eval_results/hf_unlearn.yaml`."""
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True).encode("utf-8")
