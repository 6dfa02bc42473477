"""What a training step knows of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class ForgetTokens:
    """
    What a method knows of the `N` answer tokens of the forget rows in a micro-batch.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities under the model, with gradient.
        rows (`torch.Tensor` of shape `(N,)`, int): Row of the micro-batch that each token belongs to.
        reference_log_probs (`torch.Tensor` of shape `(N,)`, *optional*): The same under the reference, where the
            method asks for it (`needs_forget_reference`).
    """

    log_probs: torch.Tensor
    rows: torch.Tensor
    reference_log_probs: torch.Tensor | None = None


class MicroBatch:
    """
    A collated micro-batch and where its scored positions are.

    Position `t` of the shifted labels is predicted by the hidden state at `t`.
    """

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.is_forget = inputs["is_forget"]
        self.rows = inputs["rows"]  # number of each row in its set
        self.model_inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        self.labels = inputs["labels"][:, 1:]
        scored = self.labels != -100
        self.forget_at = scored & self.is_forget[:, None]  # (B, T − 1)
        self.retain_at = scored & ~self.is_forget[:, None]
        self.forget_targets = self.labels[self.forget_at]
        self.retain_targets = self.labels[self.retain_at]

    @property
    def forget_rows(self) -> torch.Tensor:
        """Row of each scored forget token, shape `(N,)`."""
        return self.forget_at.nonzero()[:, 0]

    @property
    def retain_rows_only(self) -> MicroBatch:
        """The retain rows as a batch of their own, cut to their own length."""
        keep = ~self.is_forget
        length = int(self.model_inputs["attention_mask"][keep].sum(1).max())
        labels = F.pad(self.labels, (1, 0), value=-100)
        inputs = {**self.model_inputs, "labels": labels}
        return MicroBatch(
            {name: value[keep, :length] for name, value in inputs.items()}
            | {"is_forget": self.is_forget[keep], "rows": self.rows[keep]}
        )


@dataclass(frozen=True)
class Reference:
    """What the reference says of a micro-batch, as far as it was asked."""

    retain_hidden: torch.Tensor | None  # (N_retain, H)
    forget_log_probs: torch.Tensor | None  # (N_forget,)
