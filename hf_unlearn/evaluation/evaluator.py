"""One model under one protocol: at one α or at many, each row computed once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data.formats import Messages
from hf_unlearn.data.tokenization import encode_prompt
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import BatchSize
from hf_unlearn.evaluation.cache import ResultCache, content_key, decode_scores, encode_scores, model_key
from hf_unlearn.evaluation.columns import Columns, generated_columns, scored_columns
from hf_unlearn.evaluation.figures import Figure, not_computed
from hf_unlearn.evaluation.forward import causal_lm_of
from hf_unlearn.evaluation.generation import generate_answers
from hf_unlearn.evaluation.preparation import check_tokenizer, prepare_sets
from hf_unlearn.evaluation.protocols.base import GENERATED, SCORED, Protocol
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.scoring import AnswerScores, Reference, score_answers
from hf_unlearn.extrapolation.live import extrapolated, is_sharded


class Evaluator:
    """
    Evaluates a model, or a model with its memorising adapter at any α, under a protocol.

    Every row is scored once and answered once at each α; several processes share the rows, and all of them get the
    whole result. All processes must call the same methods in the same order. The weights may be sharded over them by
    ZeRO-3 or FSDP2.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]):
            A causal LM. α can be set where it is a `PeftModel`: the live adapter is rescaled, nothing is merged.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        protocol ([`Protocol`]):
            What to evaluate.
        retrained ([`Evaluation`], *optional*):
            Log of a model retrained without the forget set ([`read_log`]): forget quality, the reference attack and
            PrivLeak compare with it.
        reference_model (`PreTrainedModel`, *optional*):
            The model before unlearning, for the KL to it. Not needed with an adapter, where it is α = 0.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rows in a batch. It does not change the values.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the chat template.
        cache (`ResultCache`, *optional*):
            Where results are kept by content, so that an interrupted evaluation goes on. The weights must not change
            while the evaluator lives.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: rows that cannot be evaluated ([`prepare_sets`]), a retrained model's log
            of other rows, or the tokenizer of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        *,
        retrained: Evaluation | None = None,
        reference_model: PreTrainedModel | None = None,
        batch_size: BatchSize = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        cache: ResultCache | None = None,
        progress: bool = True,
    ) -> None:
        if cache is not None and is_sharded(model):
            raise UnlearningError(
                "`cache` keeps results under a hash of the weights, and no process holds them whole (ZeRO-3, FSDP2). "
                "Leave it out."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.protocol = protocol
        self.retrained = retrained
        self.batch_size = batch_size
        self.progress = progress
        self._reference_model = reference_model
        self._chat_template_kwargs = chat_template_kwargs
        self._cache = cache
        self._sets = prepare_sets(protocol, tokenizer, chat_template_kwargs, retrained)
        check_tokenizer(causal_lm_of(model), tokenizer, self._sets)
        self._model_key = model_key(model) if cache is not None else None
        self._reference_key = model_key(reference_model) if cache is not None and reference_model is not None else None
        self._columns: dict[tuple[float | None, str, str], Columns] = {}
        self._answers: dict[tuple[float | None, str], list[str]] = {}
        self._benchmarks: dict[float | None, dict[str, Figure]] = {}
        self._evaluations: dict[tuple[float | None, bool], Evaluation] = {}

    def evaluate(self, alpha: float | None = None, generate: bool = True) -> Evaluation:
        """
        Evaluate the model as it stands, or θ_for = θ_ref − α·ΔW.

        Args:
            alpha (`float`, *optional*): Extrapolation strength; 0 is the reference, `None` the model as it stands.
            generate (`bool`, *optional*, defaults to `True`): Whether to generate answers too, where the protocol
                measures any.
        """
        if alpha is not None and not isinstance(self.model, PeftModel):
            raise UnlearningError(
                f"α = {alpha:g} needs an adapter to scale, and the model has none. Pass a `PeftModel`."
            )
        if (alpha, generate) not in self._evaluations:
            self._evaluations[alpha, generate] = self._evaluate(alpha, generate)
        return self._evaluations[alpha, generate]

    def run(self, alphas: Iterable[float], generate: bool = True) -> list[Evaluation]:
        """Evaluate the reference and a grid of α, by rising α."""
        return [self.evaluate(alpha, generate) for alpha in sorted({0.0, *map(float, alphas)})]

    def evaluated(self) -> list[Evaluation]:
        """Everything evaluated so far, by rising α, with all that was measured."""
        alphas = {alpha for alpha, _ in self._evaluations}
        answered = {alpha for alpha, generate in self._evaluations if generate}
        return [self.evaluate(alpha, generate=alpha in answered) for alpha in sorted(alphas, key=lambda a: a or 0.0)]

    def drop_results(self, keep: Iterable[float | None] = ()) -> None:
        """Forget what was evaluated, e.g. because the adapter was trained further; `keep` names α that still hold."""
        kept = set(keep)
        for results in (self._columns, self._answers, self._evaluations):
            for key in [key for key in results if key[0] not in kept]:
                del results[key]
        self._benchmarks = {alpha: figures for alpha, figures in self._benchmarks.items() if alpha in kept}

    # ---- One α ----

    def _evaluate(self, alpha: float | None, generate: bool) -> Evaluation:
        evaluation = Evaluation(self.protocol.name, alpha)
        with extrapolated(self.model, alpha) if alpha is not None else nullcontext():
            for name, prepared in self._sets.items():
                columns: Columns = {"row": prepared.content.rows["row"][:], "ground_truth": prepared.references}
                evaluation.rows[name] = columns | self._scored(alpha, name)
            if generate:
                self._generate(alpha)
                for name in self._sets:
                    if (alpha, name) in self._answers:
                        evaluation.answers[name] = self._answers[alpha, name]
                        evaluation.rows[name] |= self._columns[alpha, name, "generated"]
            if self.protocol.benchmarks is not None:
                if alpha not in self._benchmarks:
                    self._benchmarks[alpha] = self.protocol.benchmarks(self.model, self.tokenizer)
                evaluation.figures |= self._benchmarks[alpha]
        evaluation.figures |= self.protocol.figures(evaluation, self.retrained)
        for name, prepared in self._sets.items():
            if "kl" in prepared.measures and "kl" not in evaluation.rows[name]:
                evaluation.figures[f"{name}_kl"] = not_computed("no reference model")
            if "rouge" in prepared.content.measures and "rouge" not in prepared.measures:
                evaluation.figures[f"{name}_rouge_l_recall"] = not_computed("rows without a prompt are not answered")
        return evaluation

    # ---- Results ----

    def _scored(self, alpha: float | None, name: str) -> Columns:
        prepared = self._sets[name]
        measures = prepared.measures
        if not set(measures) & set(SCORED):
            return {}
        if (alpha, name, "scored") not in self._columns:
            moments = "membership" in measures
            reference = self._reference(alpha) if "kl" in measures else None
            settings = ["scores", moments, reference is not None and (self._reference_key or "adapter")]
            keys = [self._key(alpha, *settings, row.prefix, row.rests, row.skipped) for row in prepared.encoded]

            def compute(indices: list[int], on_results: Callable) -> list[list[AnswerScores]]:
                return score_answers(
                    self.model,
                    [prepared.encoded[index] for index in indices],
                    self.tokenizer,
                    batch_size=self.batch_size,
                    moments=moments,
                    reference=reference,
                    progress=self._label(alpha, f"scoring {name.replace('_', ' ')}"),
                    on_results=on_results,
                )

            scores = self._cached(keys, compute, encode_scores, decode_scores)
            self._columns[alpha, name, "scored"] = scored_columns(
                measures, scores, prepared.scored_texts, prepared.paraphrased
            )
        return self._columns[alpha, name, "scored"]

    def _generate(self, alpha: float | None) -> None:
        """Answer the prompts of all sets together, in full batches, where that is not done."""
        wanted = [
            name
            for name, prepared in self._sets.items()
            if set(prepared.measures) & set(GENERATED) and (alpha, name) not in self._answers
        ]
        for max_new_tokens in sorted({self._sets[name].content.max_new_tokens for name in wanted}):
            names = [name for name in wanted if self._sets[name].content.max_new_tokens == max_new_tokens]
            prompts = {name: self._sets[name].content.rows["prompt"][:] for name in names}
            answers = iter(self._answered(alpha, [p for name in names for p in prompts[name]], max_new_tokens))
            for name in names:
                self._answers[alpha, name] = list(itertools.islice(answers, len(prompts[name])))
                self._columns[alpha, name, "generated"] = generated_columns(
                    self._sets[name].measures, self._sets[name].references, self._answers[alpha, name]
                )

    def _answered(self, alpha: float | None, prompts: list[str | Messages], max_new_tokens: int) -> list[str]:
        kwargs = self._chat_template_kwargs
        ends = causal_lm_of(self.model).generation_config.eos_token_id
        settings = ["answer", max_new_tokens, self.tokenizer.eos_token_id, ends]
        keys = [self._key(alpha, *settings, encode_prompt(prompt, self.tokenizer, kwargs)) for prompt in prompts]

        def compute(indices: list[int], on_results: Callable) -> list[str]:
            return generate_answers(
                self.model,
                [prompts[index] for index in indices],
                self.tokenizer,
                max_new_tokens=max_new_tokens,
                batch_size=self.batch_size,
                chat_template_kwargs=kwargs,
                progress=self._label(alpha, "answering"),
                on_results=on_results,
            )

        return self._cached(keys, compute, lambda answer: answer, lambda answer: answer)

    def _reference(self, alpha: float | None) -> Reference | None:
        """A context in which the model before unlearning is live."""
        if self._reference_model is not None:
            return lambda: _in_eval_mode(self._reference_model)
        return (lambda: _at_reference(self.model)) if alpha is not None else None

    def _label(self, alpha: float | None, doing: str) -> str | None:
        at = "" if alpha is None else f"α = {alpha:g}: "
        return f"{at}{doing} rows" if self.progress else None

    def _key(self, alpha: float | None, *content: Any) -> str | None:
        return None if self._cache is None else content_key(self._model_key, alpha, *content)

    def _cached(
        self,
        keys: list[str | None],
        compute: Callable[[list[int], Callable | None], list[Any]],
        encode: Callable[[Any], Any],
        decode: Callable[[Any], Any],
    ) -> list[Any]:
        """The result of every row: from the cache, or computed and put there."""
        if self._cache is None:
            return compute(list(range(len(keys))), None)
        cache = self._cache
        missing = [index for index, key in enumerate(keys) if cache.get(key) is None]

        def keep(positions: list[int], results: list[Any]) -> None:
            pairs = zip(positions, results, strict=True)
            cache.put({keys[missing[position]]: encode(result) for position, result in pairs})

        if missing:
            computed = compute(missing, keep)
            cache.remember({keys[i]: encode(result) for i, result in zip(missing, computed, strict=True)})
        return [decode(cache.get(key)) for key in keys]


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A model without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@contextmanager
def _at_reference(model: PeftModel) -> Iterator[PeftModel]:
    """The same weights with the adapter at scale 0."""
    with extrapolated(model, 0.0):
        yield model
