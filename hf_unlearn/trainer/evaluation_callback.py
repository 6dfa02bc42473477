"""The evaluation of a protocol during training, at one α, on all processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import Evaluation, Evaluator, Protocol
from hf_unlearn.evaluation.batching import BatchSize
from hf_unlearn.evaluation.figures import not_computed
from hf_unlearn.evaluation.protocols.base import GENERATED
from hf_unlearn.evaluation.selection import trade_off


if TYPE_CHECKING:
    from hf_unlearn.trainer.unlearning_trainer import UnlearningTrainer


METRICS_OF_A_SET = ("loss", "entropy", "mean_token_accuracy")  # what the trainer itself measures on an evaluation set


class EvaluationCallback(TrainerCallback):
    """
    Evaluates θ_for = θ_ref − α·ΔW under a protocol whenever the trainer evaluates (`eval_strategy`, `eval_steps`).

    Metrics are logged as `eval_<set>_<metric>` and are there for `metric_for_best_model`. One of them is
    `eval_trade_off`, larger is better: the harmonic mean of the share of the reference's utility that is left (at most
    1) and of 1 − |2·AUC − 1|, with the membership AUC of forget against hold-out rows. It peaks where the utility is
    whole and forget rows look like rows never seen; without hold-out rows there is none.

    The reference, α = 0, is evaluated once, before training. A figure that has a value there and later none, because
    losses are no longer finite, is left out of the logs. It never makes the best checkpoint: the trade-off of such a
    model is 0, the worst there is, and any other `metric_for_best_model` is returned as NaN.

    Args:
        trainer ([`UnlearningTrainer`]):
            The trainer it is added to. It runs before the trainer's other callbacks, so that they find its metrics.
        protocol ([`Protocol`]):
            What to evaluate, e.g. [`~hf_unlearn.custom_protocol`] or [`~hf_unlearn.tofu_protocol`].
        alpha (`float`, *optional*, defaults to `1.0`):
            Extrapolation strength; `None` evaluates the adapter as it is trained.
        generate (`bool`, *optional*, defaults to `False`):
            Whether to generate answers too, which takes longer than all the rest.
        retrained ([`Evaluation`], *optional*):
            Log of a model retrained without the forget set.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rows in a batch. A batch that does not fit the memory is halved, but not with weights sharded by ZeRO-3 or
            FSDP2, where it is an error.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: the best checkpoint is to be chosen by a metric that the evaluations
            will not have.

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
        alpha: float | None = 1.0,
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
        self.is_due = True  # set by each call of `trainer.evaluate`, which sends the event once per evaluation set
        if trainer.place_model_on_device:  # otherwise the model is where it runs only from `on_train_begin` on
            self._check_best_metric()

    def on_train_begin(self, args, state, control, **kwargs):
        self._check_best_metric()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self.is_due:
            return
        self.is_due = False
        self.evaluator.drop_results(keep=(0.0,))
        values = self._values(self.alpha)
        metrics.update(values)
        best_metric = self._best_metric()
        if best_metric in self._values(0.0):
            metrics.setdefault(best_metric, math.nan)
        self.trainer.log(values)

    def _values(self, alpha: float | None) -> dict[str, float]:
        """The figures that have a value, and the trade-off, as they are logged."""
        reference = self.evaluator.evaluate(0.0, self.generate)
        evaluation = self.evaluator.evaluate(alpha, self.generate)
        values = {f"eval_{name}": figure.value for name, figure in evaluation.figures.items()}
        utility = self.evaluator.protocol.utility
        if trade_off(reference, reference, utility) is not None:
            values["eval_trade_off"] = trade_off(evaluation, reference, utility) or 0.0
        return {name: value for name, value in values.items() if value is not None}

    # ---- The metric of the best checkpoint ----

    def _best_metric(self) -> str | None:
        """The metric that chooses the best checkpoint, as it is logged."""
        option = self.trainer.args.metric_for_best_model
        return f"eval_{option.removeprefix('eval_')}" if option else None

    def _check_best_metric(self) -> None:
        """Refuse a metric that neither α = 0 nor an evaluation set of the trainer has: transformers would fail later."""
        metric, available = self._best_metric(), self._values(0.0)
        if metric is None or metric in available or metric in self._metrics_of_sets():
            return
        protocol, reference = self.evaluator.protocol, self.evaluator.evaluate(0.0, self.generate)
        name = metric.removeprefix("eval_")
        needed = []
        for figure_name in ("membership_auc_loss", protocol.utility) if name == "trade_off" else (name,):
            figure = reference.figures.get(figure_name) or not_computed("no such figure")
            needed.append(f"{figure_name} (at α = 0 {figure.note if figure.value is None else f'{figure.value:g}'})")
        remedies = []
        if not self.generate and any(set(GENERATED) & set(content.measures) for content in protocol.sets.values()):
            remedies.append("pass generate=True for what needs generated answers")
        if "holdout" not in protocol.sets:
            remedies.append("add a hold-out set for what compares forget with hold-out rows")
        remedies.append(f"name a metric that there is: {', '.join(sorted(available))}")
        raise UnlearningError(
            f"metric_for_best_model={self.trainer.args.metric_for_best_model!r} needs {' and '.join(needed)}. Either "
            f"{', or '.join(remedies)}."
        )

    def _metrics_of_sets(self) -> set[str]:
        sets = self.trainer.eval_dataset
        prefixes = [f"eval_{name}" for name in sets] if isinstance(sets, dict) else ["eval"]
        return {f"{prefix}_{metric}" for prefix in prefixes for metric in METRICS_OF_A_SET}
