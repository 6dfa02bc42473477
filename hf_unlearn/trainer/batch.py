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
        alternate ([`ForgetTokens`], *optional*): The same of the alternate answers, whose `rows` are those of the forget
            rows they belong to, where the method has them beside the forget answers.
    """

    log_probs: torch.Tensor
    rows: torch.Tensor
    reference_log_probs: torch.Tensor | None = None
    alternate: ForgetTokens | None = None

    @property
    def log_ratios(self) -> torch.Tensor:
        """log p_θ − log p_ref of each token."""
        return self.log_probs - self.reference_log_probs


class MicroBatch:
    """
    A collated micro-batch and where its scored positions are.

    Position `t` of the shifted labels is predicted by the hidden state at `t`.
    """

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.is_forget = inputs["is_forget"]
        self.is_alternate = inputs.get("is_alternate", torch.zeros_like(self.is_forget))
        self.rows = inputs["rows"]  # number of each row in its set
        self.model_inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        self.labels = inputs["labels"][:, 1:]
        scored = self.labels != -100
        self.forget_at = scored & self.is_forget[:, None]  # (B, T − 1)
        self.alternate_at = scored & self.is_alternate[:, None]
        self.retain_at = scored & ~(self.is_forget | self.is_alternate)[:, None]
        self.forget_targets = self.labels[self.forget_at]
        self.alternate_targets = self.labels[self.alternate_at]
        self.retain_targets = self.labels[self.retain_at]

    @property
    def forget_rows(self) -> torch.Tensor:
        """Row of each scored forget token, shape `(N,)`."""
        return self.forget_at.nonzero()[:, 0]

    @property
    def alternate_rows(self) -> torch.Tensor:
        """Forget row of each scored alternate token, shape `(N,)`."""
        return self.alternate_at.nonzero()[:, 0] - int(self.is_forget.sum())

    def only(self, keep: torch.Tensor) -> MicroBatch:
        """Some rows, by a mask of shape `(B,)`, as a batch of their own that is cut to their own length."""
        length = int(self.model_inputs["attention_mask"][keep].sum(1).max())
        labels = F.pad(self.labels, (1, 0), value=-100)
        inputs = {**self.model_inputs, "labels": labels}
        return MicroBatch(
            {name: value[keep, :length] for name, value in inputs.items()}
            | {"is_forget": self.is_forget[keep], "is_alternate": self.is_alternate[keep], "rows": self.rows[keep]}
        )


@dataclass(frozen=True)
class Reference:
    """What the reference says of a micro-batch, as far as it was asked."""

    retain_hidden: torch.Tensor | None  # (N_retain, H)
    forget: torch.Tensor | None  # (N_forget, W): log-probabilities with W = 1, or hidden states
    alternate_log_probs: torch.Tensor | None = None  # (N_alternate,)
