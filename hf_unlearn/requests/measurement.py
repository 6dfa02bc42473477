"""What each request does to its own rows, to those of the others and to the retain set, on the live sum of adapters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data import to_prompt_completion
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.batching import BatchSize
from hf_unlearn.evaluation.columns import scored_columns
from hf_unlearn.evaluation.preparation import check_tokenizer, prepare_sets
from hf_unlearn.evaluation.protocols.base import EvaluationSet, Protocol
from hf_unlearn.evaluation.scoring import score_answers
from hf_unlearn.requests.records import parse_date


if TYPE_CHECKING:
    from hf_unlearn.requests.ledger import Ledger

RETAIN = "retain"
MAX_SHRINK = 0.1
NO_EFFECT = 0.01  # of the answer probability

Scores = dict[str, float]  # mean answer probability and mean loss over the rows of a set


@dataclass
class Measurement:
    """
    Mean answer probability and loss of the rows of each request under the base, under its own adapter alone, under all
    active requests but the newest (`before`) and under all of them (`together`).

    Args:
        date (`str`): When it was measured.
        active (list of `str`): The requests that were active, by id.
        newest (`str`): The one that was added last.
        max_shrink (`float`): Share of an effect, or of the retain probability, that may get lost without a word.
        requests (`dict`): Id -> `base`, `alone`, `before` and `together`.
        not_measured (`dict`): Id -> why its rows could not be measured.
        retain (`dict`, *optional*): `base`, `before` and `together` of the retain set.
    """

    date: str
    active: list[str]
    newest: str
    max_shrink: float = MAX_SHRINK
    requests: dict[str, dict[str, Scores]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    retain: dict[str, Scores] | None = None

    def effect(self, id: str, state: str) -> float:
        """By how much a state lowers the mean answer probability of a request's rows."""
        return self.requests[id]["base"]["probability"] - self.requests[id][state]["probability"]

    def shrink(self, id: str, state: str) -> float | None:
        """Share of the effect in a state that is lost under all together; `None` where there is no effect to lose."""
        effect = self.effect(id, state)
        return None if effect < NO_EFFECT else 1 - self.effect(id, "together") / effect

    def findings(self) -> list[str]:
        """
        In words: interference, which is an effect that shrinks by more than `max_shrink`, requests without any effect,
        and a retain set that has lost more than that.
        """
        found = []
        for id in self.requests:
            newest = self.shrink(id, "before") if id != self.newest else None
            others = self.shrink(id, "alone")
            if newest is not None and newest > self.max_shrink:
                found.append(
                    f"{self.newest} interferes with {id}: it takes {newest:.0%} of the effect on its rows "
                    f"({self._fall(id, 'before')})."
                )
            elif others is not None and others > self.max_shrink:
                found.append(
                    f"The others interfere with {id}: {others:.0%} of the effect that it has alone is lost "
                    f"({self._fall(id, 'alone')})."
                )
            elif others is None:
                found.append(
                    f"{id} alone lowers the answer probability of its rows by {self.effect(id, 'alone'):.3f} only: "
                    "they were hardly known, or its α is too small."
                )
        return found + self._utility()

    def _utility(self) -> list[str]:
        """What the retain set has lost, where that is more than `max_shrink`."""
        if self.retain is None:
            return []
        base, before, now = (self.retain[state]["probability"] for state in ("base", "before", "together"))
        if 1 - now / base <= self.max_shrink:
            return []
        return [
            f"The retain set has lost {1 - now / base:.0%} of its answer probability ({base:.3f} under the base, "
            f"{before:.3f} before {self.newest}, {now:.3f} now): what the requests do to other rows adds up. Choose "
            "smaller α, or train with more retain rows."
        ]

    def _fall(self, id: str, state: str) -> str:
        probabilities = {name: scores["probability"] for name, scores in self.requests[id].items()}
        return (
            f"answer probability {probabilities['base']:.3f} under the base, {probabilities[state]:.3f} "
            f"{'before' if state == 'before' else 'alone'}, {probabilities['together']:.3f} now"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"findings": self.findings()}


class LiveRequests:
    """
    A base model with the adapters of several requests, any of them live at its own α.

    Args:
        model (`PreTrainedModel`): The base model. It is as it was after [`~LiveRequests.unload`].
        adapters (`dict`): Id -> folder of the memorising adapter.
        alphas (`dict`): Id -> α.
    """

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Path], alphas: Mapping[str, float]) -> None:
        if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
            raise UnlearningError("The model carries an adapter already. Pass the base model of the ledger as it is.")
        self._alphas = dict(alphas)
        self._names = {id: f"request_{number}" for number, id in enumerate(adapters)}  # ids may hold "lora_"
        self.model: PeftModel | None = None
        for id, folder in adapters.items():
            if self.model is None:
                self.model = PeftModel.from_pretrained(model, folder, adapter_name=self._names[id])
            else:
                self.model.load_adapter(folder, adapter_name=self._names[id])

    @contextmanager
    def subset(self, ids: Collection[str]) -> Iterator[PeftModel]:
        """Within this context the model is θ_ref − Σ α·ΔW over these requests; the base where there are none."""
        if not ids:
            with self.model.disable_adapter():
                yield self.model
            return
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        scaling = [dict(layer.scaling) for layer in layers]
        try:
            self.model.base_model.set_adapter([self._names[id] for id in ids])
            for layer in layers:
                for id in ids:
                    layer.set_scale(self._names[id], -self._alphas[id])
            yield self.model
        finally:
            for layer, previous in zip(layers, scaling, strict=True):
                layer.scaling.update(previous)

    def unload(self) -> None:
        """Take the adapters off the model."""
        self.model.unload()


def plan_measurement(
    ledger: Ledger, max_shrink: float = MAX_SHRINK, has_retain: bool = False
) -> tuple[Measurement, dict[str, datasets.Dataset]]:
    """
    What can be measured of a ledger, and the rows for it.

    Args:
        ledger ([`Ledger`]): The ledger.
        max_shrink (`float`, *optional*, defaults to `0.1`): As for [`Ledger.measure`].
        has_retain (`bool`, *optional*, defaults to `False`): Whether there is a retain set to measure.
    """
    if not 0 < max_shrink < 1:
        raise UnlearningError(f"`max_shrink={max_shrink}` (--max_shrink) must be above 0 and below 1.")
    active = [request.id for request in ledger.select()]
    newest = [request.id for request in ledger.requests if request.is_active][-1]
    measurement, rows = Measurement(parse_date(None), active, newest, max_shrink), {}
    for id in active:
        try:
            rows[id] = ledger.rows(id)
        except UnlearningError as error:
            measurement.not_measured[id] = str(error)
    if not rows and not has_retain:
        raise UnlearningError(
            "There is nothing to measure: the ledger has the rows of no active request. Pass --retain_dataset, or add "
            "requests with --forget_dataset or --keep_rows."
        )
    return measurement, rows


@torch.no_grad()
def measure_requests(
    live: LiveRequests,
    tokenizer: PreTrainedTokenizerBase,
    measurement: Measurement,
    rows: Mapping[str, datasets.Dataset],
    retain_rows: datasets.Dataset | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> None:
    """
    Fill in a measurement.

    Args:
        live ([`LiveRequests`]): The model with the adapters of the active requests.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        measurement ([`Measurement`]): Which requests are active, and which is the newest.
        rows (`dict`): Id -> rows of the request, as far as there are any.
        retain_rows (`datasets.Dataset`, *optional*): Rows that must stay.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`): Rows in a batch. It changes no value.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.
    """
    chat = tokenizer.chat_template is not None
    sets = {f"forget {id}": content for id, content in rows.items()} | ({RETAIN: retain_rows} if retain_rows else {})
    contents = {
        name: EvaluationSet(to_prompt_completion(content, name=f"{name} set", chat=chat), ("probability",))
        for name, content in sets.items()
    }
    prepared = prepare_sets(Protocol("requests", contents, question_figures, utility=RETAIN), tokenizer)
    check_tokenizer(live.model.get_base_model(), tokenizer, prepared)
    results: dict[tuple[str, frozenset[str]], Scores] = {}

    def score(name: str, ids: Collection[str]) -> Scores:
        key = name, frozenset(ids)
        if key not in results:
            with live.subset(ids) as model:
                scores = score_answers(
                    model,
                    prepared[name].encoded,
                    tokenizer,
                    batch_size=batch_size,
                    progress=f"scoring {name} rows under {len(ids)} requests" if progress else None,
                )
            columns = scored_columns(("probability",), scores, prepared[name].scored_texts, False)
            means = {column: statistics.fmean(columns[column]) for column in ("probability", "loss")}
            if not all(map(math.isfinite, means.values())):
                raise UnlearningError(
                    f"The loss of {name} rows is not finite under {', '.join(sorted(ids)) or 'the base'}. Measure in "
                    "float32 (--dtype), or choose a smaller α."
                )
            results[key] = means
        return results[key]

    before = [id for id in measurement.active if id != measurement.newest]
    common = {"base": (), "before": before, "together": measurement.active}
    for id in rows:
        states = common | {"alone": [id]}
        measurement.requests[id] = {state: score(f"forget {id}", ids) for state, ids in states.items()}
    if retain_rows:
        measurement.retain = {state: score(RETAIN, ids) for state, ids in common.items()}
