"""What is audited: a model, its sets, and how rows are put to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.audit.findings import AS_IT_IS, Measurement
from hf_unlearn.audit.options import AuditOptions
from hf_unlearn.audit.weights import BaseWeights
from hf_unlearn.data import load_rows, to_prompt_completion
from hf_unlearn.data.formats import Messages, text_of
from hf_unlearn.data.tokenization import encode_prompt, is_blank
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import metrics
from hf_unlearn.evaluation.batching import run_in_batches
from hf_unlearn.evaluation.forward import Backbone, end_token_ids
from hf_unlearn.evaluation.generation import MAX_TOKENS, decode
from hf_unlearn.evaluation.preparation import PreparedSet, check_tokenizer, prepare_sets
from hf_unlearn.evaluation.protocols.base import EvaluationSet, Protocol
from hf_unlearn.evaluation.protocols.rows import first_rows
from hf_unlearn.evaluation.scoring import AnswerScores, EncodedAnswers, encode_answers, score_answers


PARAPHRASED = "paraphrased_question"


@dataclass(frozen=True)
class Row:
    """
    A row, as it is asked.

    Args:
        prompt, completion (`str` or messages): The question and its answer.
        answer (`str`): The text of the answer.
        paraphrase (`str` or messages, *optional*): The question in other words.
    """

    prompt: str | Messages
    completion: str | Messages
    answer: str
    paraphrase: str | Messages | None


def load_sets(
    sets: dict[str, Any], chat: bool, paraphrased_questions: str | None = None, limit: int | None = None
) -> dict[str, datasets.Dataset]:
    """
    The sets as prompts and completions.

    Args:
        sets (`dict[str, Any]`): `"forget"`, `"retain"` and, optionally, `"holdout"`: what [`load_rows`] takes.
        chat (`bool`): Whether the tokenizer has a chat template.
        paraphrased_questions (`str`, *optional*): Column of the forget set (and of hold-out rows, where they have it)
            with the questions in other words; `paraphrased_question` where there is one and none is named.
        limit (`int`, *optional*): The first rows of each set only.
    """
    shaped = {}
    for name, source in sets.items():
        rows = first_rows(load_rows(source, name=f"{name} set"), limit)
        column = paraphrased_questions or PARAPHRASED
        if column in rows.column_names and column != PARAPHRASED:
            rows = rows.remove_columns([c for c in (PARAPHRASED,) if c in rows.column_names])
            rows = rows.rename_column(column, PARAPHRASED)
        elif column not in rows.column_names and paraphrased_questions is not None and name == "forget":
            raise UnlearningError(
                f"The forget set has no column {column!r} of paraphrased questions; it has "
                f"{', '.join(rows.column_names)}. Name one of these with --paraphrased_questions, or leave it out."
            )
        shaped[name] = to_prompt_completion(rows, name=f"{name} set", chat=chat)
    return shaped


class Case:
    """
    A model with the sets that it is audited on. What is measured is what the model's weights say at that time.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        sets (`dict[str, datasets.Dataset]`): Of [`load_sets`].
        options ([`AuditOptions`]): Options.
        model (`PreTrainedModel`, *optional*): The model; without it, an audit can be planned but not run.
        base ([`BaseWeights`], *optional*): The model before forgetting.
        alpha (`float`, *optional*): The α at which the model was extrapolated, where that is known.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: rows that cannot be used, or the tokenizer of another model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sets: dict[str, datasets.Dataset],
        options: AuditOptions,
        model: PreTrainedModel | None = None,
        base: BaseWeights | None = None,
        alpha: float | None = None,
        progress: bool = False,
    ) -> None:
        self.tokenizer, self.options, self.base, self.alpha = tokenizer, options, base, alpha
        self.doing: str | None = "as it is" if progress else None
        self._model = model
        contents = {name: EvaluationSet(rows, ("probability",), 1, options.max_length) for name, rows in sets.items()}
        protocol = Protocol("audit", contents, figures=lambda evaluation, retrained: {}, utility="")
        self.prepared: dict[str, PreparedSet] = prepare_sets(protocol, tokenizer)
        self.rows = {name: _rows(rows) for name, rows in sets.items()}
        if len({isinstance(self.rows[name][0].prompt, str) for name in self.asked_sets}) > 1:
            raise UnlearningError(
                "Of the forget set and the hold-out set one holds conversations and the other text, so they cannot be "
                "compared. Bring both into the same shape."
            )
        if model is not None:
            check_tokenizer(model, tokenizer, self.prepared)

    @property
    def model(self) -> PreTrainedModel:
        """The model, with the weights that it has at the time."""
        if self._model is None:
            raise ValueError("a case without a model can be planned only")
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether there is a model, and not only a plan."""
        return self._model is not None

    @property
    def asked_sets(self) -> list[str]:
        """The sets that are put to every attack: the forget set and, where there are any, hold-out rows."""
        return [name for name in ("forget", "holdout") if name in self.rows]

    @property
    def chat(self) -> bool:
        """Whether the forget rows are conversations."""
        return not isinstance(self.rows["forget"][0].prompt, str)

    def has_prompts(self, name: str) -> bool:
        """Whether each row of a set asks something."""
        return not any(is_blank(row.prompt) for row in self.rows[name])

    # ---- As it is ----

    @cached_property
    def scores(self) -> dict[str, list[AnswerScores]]:
        """Per set, the tokens of each answer under the model as it is."""
        return {name: self.score([*prepared.encoded]) for name, prepared in self.prepared.items()}

    @cached_property
    def asked(self) -> dict[str, Measurement]:
        """
        Per set, the model as it is, asked as the rows ask, with the scores that membership goes by. Answers are generated
        for forget and hold-out rows.
        """
        found = {name: self.ask(AS_IT_IS, name, scores=self.scores[name]) for name in self.rows}
        for name, each in found.items():
            each.values["loss"] = [metrics.answer_loss(row.log_probs) for row in self.scores[name]]
            each.values["min_k"] = [metrics.min_k(row.without_end(row.log_probs)) for row in self.scores[name]]
        return found

    @cached_property
    def of_base(self) -> dict[str, Measurement]:
        """The same of the base, without generated answers. Call it while the model has the base's weights."""
        return {name: self.ask("base", name, generate=False, x=0.0) for name in self.rows}

    # ---- Putting rows to the model ----

    def ask(
        self,
        variant: str,
        name: str,
        prompts: dict[int, str | Messages] | None = None,
        *,
        positions: Sequence[int] | None = None,
        generate: bool | None = None,
        scores: list[AnswerScores] | None = None,
        x: float | None = None,
    ) -> Measurement:
        """
        Measure rows of a set under the weights of the moment.

        Args:
            variant (`str`): Name of the variant.
            name (`str`): Name of the set.
            prompts (`dict[int, ...]`, *optional*): Other prompts, by the place of the row; rows without one are left out,
                and rows that do not fit into `max_length` with it.
            positions (sequence of `int`, *optional*): Which rows; all of them if not given.
            generate (`bool`, *optional*): Whether to generate answers too; for forget and hold-out rows if not given.
            scores (list of [`AnswerScores`], *optional*): Of all rows, where they are known.
            x (`float`, *optional*): Place on the axis of a curve.
        """
        generate = (name in self.asked_sets) if generate is None else generate
        if prompts is None:
            chosen = list(range(len(self.rows[name]))) if positions is None else list(positions)
            encoded = [self.prepared[name].encoded[place] for place in chosen]
            asked = {place: self.rows[name][place].prompt for place in chosen}
        else:
            chosen, encoded = self._encode(name, prompts)
            asked = prompts
        scores = self.score(encoded) if scores is None else scores
        values = {"probability": [metrics.probability(each.log_probs) for each in scores]}
        answers = None
        if generate and chosen and not any(is_blank(asked[place]) for place in chosen):
            answers = self.answer([encode_prompt(asked[place], self.tokenizer) for place in chosen])
            texts = [self.rows[name][place].answer for place in chosen]
            values["rouge_l_recall"] = [metrics.rouge_l_recall(*pair) for pair in zip(texts, answers, strict=True)]
        return Measurement(variant, name, chosen, values, answers, x)

    def score(self, encoded: list[EncodedAnswers]) -> list[AnswerScores]:
        """The tokens of each answer under the weights of the moment."""
        progress = self.doing and f"{self.doing}: scoring rows"
        scores = score_answers(
            self.model, encoded, self.tokenizer, batch_size=self.options.batch_size, progress=progress
        )
        return [row[0] for row in scores]

    def answer(self, prompts: list[list[int]]) -> list[str]:
        """Greedy continuations of token ids, as text without special tokens and outer white space."""
        backbone = Backbone(self.model)
        ends = end_token_ids(backbone.lm, self.tokenizer)
        longest, training = self.options.max_new_tokens, self.model.training
        self.model.eval()

        def run(indices: list[int]) -> list[str]:
            answers = decode(backbone, [prompts[index] for index in indices], longest, ends)
            return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

        try:
            with torch.no_grad():
                return run_in_batches(
                    [len(prompt) + longest for prompt in prompts],
                    run,
                    batch_size=self.options.batch_size,
                    max_tokens=MAX_TOKENS,
                    progress=self.doing and f"{self.doing}: answering rows",
                )
        finally:
            self.model.train(training)

    def _encode(self, name: str, prompts: dict[int, str | Messages]) -> tuple[list[int], list[EncodedAnswers]]:
        """The rows that fit into the longest sequence with another prompt, and their tokens."""
        kept = {}
        for place, prompt in prompts.items():
            row = self.rows[name][place]
            encoded = encode_answers(prompt, [row.completion], self.tokenizer, self.options.max_length)
            if not encoded.num_cut[0]:
                kept[place] = encoded
        left_out = len(prompts) - len(kept)
        if left_out:
            warnings.warn(
                f"{name} set: {left_out} rows do not fit into {self.options.max_length} tokens under this attack and are "
                "left out of it.",
                stacklevel=2,
            )
        return list(kept), list(kept.values())


def _rows(rows: datasets.Dataset) -> list[Row]:
    paraphrases = rows["paraphrased_prompt"][:] if "paraphrased_prompt" in rows.column_names else [None] * len(rows)
    pairs = zip(rows["prompt"][:], rows["completion"][:], paraphrases, strict=True)
    return [Row(prompt, completion, text_of(completion).strip(), other) for prompt, completion, other in pairs]
