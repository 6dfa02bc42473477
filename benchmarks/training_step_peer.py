"""
Gradient difference with a KL term, for training_step.py: that of open-unlearning or, without its source, restated.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_unlearn.data.pairing import PairCollator


def build_grad_diff(
    model: PreTrainedModel,
    args: TrainingArguments,
    forget: Dataset,
    retain: Dataset,
    pad_token_id: int,
    source: Path | None,
) -> Trainer:
    """
    Args:
        model (`PreTrainedModel`): The model; all its weights are trained.
        args (`TrainingArguments`): Options.
        forget (`datasets.Dataset`): Tokenised forget rows.
        retain (`datasets.Dataset`): As many tokenised retain rows.
        pad_token_id (`int`): Token id of the padding.
        source (`Path`, *optional*): Checkout of open-unlearning.
    """
    forget, retain = (rows.select_columns(["input_ids", "labels"]) for rows in (forget, retain))
    collate = PairCollator(pad_token_id)
    return (GradDiff if source is None else peer_class(source))(
        model=model,
        args=args,
        train_dataset=[{"forget": f, "retain": r} for f, r in zip(forget, retain, strict=True)],
        data_collator=lambda pairs: {name: collate([pair[name] for pair in pairs]) for name in ("forget", "retain")},
        retain_loss_type="KL",
    )


def peer_class(source: Path) -> type[Trainer]:
    """`GradDiff` of the checkout, unchanged but for an argument that today's Transformers pass besides."""
    package = types.ModuleType("trainer")  # spares what `trainer/__init__.py` imports for the command line
    package.__path__ = [str(source / "src" / "trainer")]
    sys.modules["trainer"] = package
    grad_diff = importlib.import_module("trainer.unlearn.grad_diff").GradDiff

    class PeerGradDiff(grad_diff):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

    return PeerGradDiff


class GradDiff(Trainer):
    """Gradient difference with a KL term to a copy of the model, from full logits of all positions."""

    def __init__(self, *args: Any, retain_loss_type: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference = copy.deepcopy(self.model).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget_loss = -model(**inputs["forget"]).loss
        with torch.no_grad():
            reference = F.log_softmax(self.reference(**inputs["retain"]).logits, dim=-1).flatten(0, 1)
        log_probs = F.log_softmax(model(**inputs["retain"]).logits, dim=-1).flatten(0, 1)
        return forget_loss + F.kl_div(log_probs, reference, reduction="batchmean", log_target=True)
