"""The evaluation of a protocol during training, at one α, on all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainerCallback

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import Evaluation, Evaluator, Protocol
from hf_unlearn.evaluation.batching import BatchSize
from hf_unlearn.evaluation.selection import trade_off


if TYPE_CHECKING:
    from hf_unlearn.trainer.unlearning_trainer import UnlearningTrainer


class EvaluationCallback(TrainerCallback):
    """
    Evaluates θ_for = θ_ref − α·ΔW under a protocol whenever the trainer evaluates (`eval_strategy`, `eval_steps`).

    Metrics are logged as `eval_<set>_<metric>` and are there for `metric_for_best_model`. One of them is
    `eval_trade_off`, larger is better: the harmonic mean of the share of the reference's utility that is left (at most
    1) and of 1 − |2·AUC − 1|, with the membership AUC of forget against hold-out rows. It peaks where the utility is
    whole and forget rows look like rows never seen; without hold-out rows there is none.

    Args:
        trainer ([`UnlearningTrainer`]):
            The trainer it is added to.
        protocol ([`Protocol`]):
            What to evaluate, e.g. [`~hf_unlearn.custom_protocol`] or [`~hf_unlearn.tofu_protocol`].
        alpha (`float`, *optional*, defaults to `1.0`):
            Extrapolation strength.
        generate (`bool`, *optional*, defaults to `False`):
            Whether to generate answers too, which takes longer than all the rest.
        retrained ([`Evaluation`], *optional*):
            Log of a model retrained without the forget set.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rows in a batch.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: the best checkpoint is to be chosen by a figure that cannot be computed.

    Example:

        trainer = ExtrapolationTrainer(
            model, ExtrapolationConfig(eval_strategy="steps", eval_steps=5), "people/forget", "people/retain"
        )
        trainer.add_callback(EvaluationCallback(trainer, protocol))
    """

    def __init__(
        self,
        trainer: UnlearningTrainer,
        protocol: Protocol,
        alpha: float = 1.0,
        generate: bool = False,
        retrained: Evaluation | None = None,
        batch_size: BatchSize = "auto",
    ) -> None:
        self.trainer = trainer
        self.alpha = alpha
        self.generate = generate
        self.evaluator = Evaluator(
            trainer.peft_model,
            trainer.processing_class,
            protocol,
            retrained=retrained,
            batch_size=batch_size,
            progress=not trainer.args.disable_tqdm,
        )
        self._step: int | None = None
        wanted = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
        if wanted == "trade_off" and "holdout" not in protocol.sets:
            raise UnlearningError(
                "metric_for_best_model='eval_trade_off' needs hold-out rows, and the protocol has none: without them "
                "nobody can say which checkpoint has forgotten and which has forgotten too much. Add a hold-out set."
            )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self._step == state.global_step:  # with several evaluation sets the event comes once for each
            return
        self._step = state.global_step
        self.evaluator.drop_results(keep=(0.0,))
        reference = self.evaluator.evaluate(0.0, self.generate)
        evaluation = self.evaluator.evaluate(self.alpha, self.generate)
        values = {f"eval_{name}": figure.value for name, figure in evaluation.figures.items()}
        values["eval_trade_off"] = trade_off(evaluation, reference, self.evaluator.protocol.utility)
        values = {name: value for name, value in values.items() if value is not None}
        metrics.update(values)
        self.trainer.log(values)
