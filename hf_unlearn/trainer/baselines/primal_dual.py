"""PDU: forgetting under a bound on the retain loss, whose weight is a dual variable."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_unlearn.errors import UnlearningError
from hf_unlearn.lm_head import LMHead
from hf_unlearn.losses import margin_flattening
from hf_unlearn.trainer.baselines.base import BaselineConfig
from hf_unlearn.trainer.baselines.distillation import VocabularyLossTrainer
from hf_unlearn.trainer.batch import MicroBatch, Reference


@dataclass
class PDUConfig(BaselineConfig):
    """
    Configuration of [`PDUTrainer`]. First value, step size and warm-up of the dual variable are its authors' for TOFU; the
    first value is large because the forget loss is a square of logits.

    Args:
        retain_nll_weight (`float`, *optional*, defaults to `100.0`):
            First value of the dual variable.
        retain_nll_limit (`float`, *optional*):
            Bound ε on the cross-entropy of the retain answers, in nats a token. If not set, `1 + retain_tolerance` times
            what it is before training, which one pass over the retain set measures.
        retain_tolerance (`float`, *optional*, defaults to `0.1`):
            By how much the cross-entropy of the retain answers may grow, as a share of what it is before training.
        dual_step_size (`float`, *optional*, defaults to `5.0`):
            Step size η of the dual variable.
        dual_warmup_epochs (`float`, *optional*, defaults to `5.0`):
            Epochs before the dual variable begins to move.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    retain_nll_weight: float = field(default=100.0, metadata={"help": "First value of the dual variable."})
    retain_nll_limit: float | None = field(
        default=None,
        metadata={
            "help": "Bound ε on the cross-entropy of the retain answers, in nats a token. If not set, `1 + "
            "retain_tolerance` times what it is before training, which one pass over the retain set measures."
        },
    )
    retain_tolerance: float = field(
        default=0.1,
        metadata={
            "help": "By how much the cross-entropy of the retain answers may grow, as a share of what it is before "
            "training."
        },
    )
    dual_step_size: float = field(default=5.0, metadata={"help": "Step size η of the dual variable."})
    dual_warmup_epochs: float = field(
        default=5.0, metadata={"help": "Epochs before the dual variable begins to move."}
    )

    positive = ("forget_weight", "dual_step_size")
    not_negative = ("retain_tolerance", "dual_warmup_epochs")

    @property
    def uses_retain(self) -> bool:
        return True

    def _check_values(self) -> None:
        super()._check_values()
        if self.retain_nll_limit is not None and self.retain_nll_limit < 0:
            raise UnlearningError(
                f"retain_nll_limit={self.retain_nll_limit} cannot be kept: no cross-entropy is below 0. Leave it out "
                "for a bound that follows from the model."
            )


class DualVariable(TrainerCallback, ExportableState):
    """
    The weight of the retain loss, raised while the loss is above its bound and lowered to no less than 0 while it is
    below; part of the state that checkpoints hold.

    Args:
        weight (`float`): First value.
        limit (`float`, *optional*): Bound ε.
    """

    def __init__(self, weight: float = 1.0, limit: float | None = None) -> None:
        self.weight = weight
        self.limit = limit

    def state(self) -> dict[str, dict[str, float | None]]:
        return {"args": {}, "attributes": {"weight": self.weight, "limit": self.limit}}

    def update(self, retain_loss: float, step_size: float) -> None:
        """One step of ascent on the dual."""
        self.weight = max(0.0, self.weight + step_size * (retain_loss - self.limit))


class PDUTrainer(VocabularyLossTrainer):
    """
    Primal-dual unlearning (arXiv 2506.05314): flattens the logits on the forget answers subject to a bound ε on the
    cross-entropy L of the retain answers. The step minimises forget + λ·L, then λ ← max(0, λ + η·(L − ε)), with L of the
    whole batch of the step.
    """

    _name = "PDU"
    method = "pdu"
    config_class = PDUConfig

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(DualVariable(self.args.retain_nll_weight, self.args.retain_nll_limit))
        self.add_callback(_DualStep(self))
        self._retain_sum: torch.Tensor | float = 0.0  # of the micro-batches of a step
        self._retain_tokens = 0

    @property
    def dual(self) -> DualVariable:
        """The dual variable; transformers may put another object in its place when a run is resumed."""
        return next(item for item in self.callback_handler.callbacks if isinstance(item, DualVariable))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | {"dual_weight": self.dual.weight} if self.model.training else logs, start_time)

    def score_forget(
        self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor, reference: Reference | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return head.score_tiles(hidden, margin_flattening(targets))

    @property
    def retain_weights(self) -> dict[str, float]:
        return {"retain_kl": self.args.retain_kl_weight, "retain_nll": self.dual.weight}

    def score_retain(
        self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor, reference: Reference | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        log_probs, is_top1 = head.score(hidden, targets)
        terms = {"retain_nll": -log_probs}
        self._retain_sum = self._retain_sum - log_probs.detach().sum()
        self._retain_tokens += len(targets)
        if self.args.retain_kl_weight > 0:
            terms["retain_kl"], _ = head.kl_from_reference(
                hidden, reference.retain_hidden, targets, self.reference_head
            )
        return terms, is_top1

    def prepare_run(self) -> None:
        saved = self.state.stateful_callbacks.get("DualVariable")
        if saved is not None:  # resumed, or as it was constructed
            vars(self.dual).update(saved["attributes"])
        if self.dual.limit is None:
            self.dual.limit = (1 + self.args.retain_tolerance) * self._measure_retain_loss()

    def step_dual(self) -> None:
        """Move the dual variable by the retain loss of the step that was just taken."""
        sums = self._reduced(self._retain_sum, self._retain_tokens)
        self._retain_sum, self._retain_tokens = 0.0, 0
        if sums[1] > 0 and self.state.epoch >= self.args.dual_warmup_epochs:
            self.dual.update(sums[0] / sums[1], self.args.dual_step_size)

    def _reduced(self, *values: torch.Tensor | float) -> list[float]:
        """Sums over the processes."""
        values = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(values, "sum").tolist()

    def _measure_retain_loss(self) -> float:
        """Cross-entropy of the retain answers before training, a token; the processes share the rows."""
        size = self.args.per_device_train_batch_size
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        rows = list(range(len(self.train_dataset.retain)))
        rounds = -(-len(rows) // (size * processes))  # every process runs the model equally often
        total, count = 0.0, 0
        for number in range(rounds):
            start = (number * processes + index) * size
            mine = rows[start : start + size]
            loss, tokens = self._retain_loss_of(mine or rows[:1])
            total, count = (total + loss, count + tokens) if mine else (total, count)
        total, count = self._reduced(total, count)
        return total / count

    def _retain_loss_of(self, rows: list[int]) -> tuple[float, int]:
        """Sum of the cross-entropies of some retain rows, and its number of terms."""
        held = self.train_dataset.retain
        encoded = [{key: held[row][key] for key in ("input_ids", "labels")} for row in rows]
        inputs = self.data_collator(encoded)
        inputs |= {"is_forget": torch.zeros(len(rows), dtype=torch.bool), "rows": torch.tensor(rows)}
        batch = MicroBatch({key: value.to(self.accelerator.device) for key, value in inputs.items()})

        def score(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
            return head.score(hidden[:, :-1][batch.retain_at], batch.retain_targets).log_probs

        self.model_wrapped.eval()
        with torch.no_grad():
            log_probs = self.model_wrapped(**batch.model_inputs, score_fn=score)
        self.model_wrapped.train()
        return -log_probs.double().sum().item(), len(log_probs)


class _DualStep(TrainerCallback):
    def __init__(self, trainer: PDUTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.step_dual()
