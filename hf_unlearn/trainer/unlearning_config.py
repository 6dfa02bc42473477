"""Options that every unlearning method shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from hf_unlearn.errors import UnlearningError


@dataclass
class UnlearningConfig(SFTConfig):
    """
    Configuration of [`UnlearningTrainer`]: what every unlearning method shares.

    Only the options that differ from [`~trl.SFTConfig`] are listed; every option of [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`] is accepted, except for those that make no sense here and are refused.

    Args:
        retain_kl_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ of the retain term, KL(reference ‖ model) over the answer tokens of the retain rows. `0` leaves it
            out.
        retain_nll_weight (`float`, *optional*, defaults to `0.0`):
            Weight of another retain term, the cross-entropy of the answer tokens of the retain rows. The retain set is
            needed while either weight is above 0.
        retain_kl_scale (`float`, *optional*, defaults to `1.0`):
            Where the retain term is measured: with the adapter multiplied by this. `1` (the paper) holds the trained
            model to the reference on the retain rows; `-1` (mirror consistency) holds θ_ref − ΔW, on whose side the
            forget model lies.
        retain_kl_both_signs (`bool`, *optional*, defaults to `False`):
            Whether to measure the retain term on both sides of the reference: every other retain row at minus
            `retain_kl_scale`, in each epoch those that were not in the epoch before.
        retain_per_forget (`int`, *optional*, defaults to `1`):
            Retain rows that accompany each forget row. An epoch is one pass over the forget set.
        retain_sample_size (`int`, *optional*, defaults to `200`):
            Retain rows that are sampled from the model before training where there is no retain set.
        retain_sample_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which they are sampled.
        paraphrases (`str`, *optional*):
            Column of the forget set with paraphrased answers (a text or a list of texts a row). Each becomes a further
            forget row of the same prompt.
        paraphrased_questions (`str`, *optional*):
            Column of the forget set with paraphrased questions. Each becomes a further forget row of the same answer.
        wrong_answers (`str`, *optional*):
            Column of the forget set with wrong answers. They join the retain rows: the model is held to the reference
            on them.
        reference_cache (`bool`, *optional*):
            Whether to compute what the reference says of each row once and read it from a memory-mapped file in
            `output_dir` ever after, instead of running the reference in every step. If not set, it is used where the
            rows are met twice or more and the file takes at most a tenth of the free disk.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to switch off the dropout of the base model, so that the retain term starts at zero. `lora_dropout`
            stays as configured.
        learning_rate (`float`, *optional*, defaults to `2e-4`):
            Initial learning rate of AdamW. LoRA wants 1e-4 to 1e-3.
        num_train_epochs (`float`, *optional*, defaults to `10`):
            Passes over the forget set.
        weight_decay (`float`, *optional*, defaults to `0.01`):
            Weight decay of AdamW.
        warmup_steps (`float`, *optional*, defaults to `0.1`):
            Steps over which the learning rate rises to its value; below 1, their share of all steps.
        logging_steps (`float`, *optional*, defaults to `1`):
            Optimiser steps between two logs. Unlearning runs are short.
        bf16 (`bool`, *optional*):
            Whether to train in bf16 mixed precision. If not set, it is used where an accelerator supports it, and not
            on CPU.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to train on CPU although an accelerator is there.
    """

    retain_kl_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight λ of the retain term, KL(reference ‖ model) over the answer tokens of the retain rows. `0` "
            "leaves it out."
        },
    )
    retain_nll_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of another retain term, the cross-entropy of the answer tokens of the retain rows. The "
            "retain set is needed while either weight is above 0."
        },
    )
    retain_kl_scale: float = field(
        default=1.0,
        metadata={
            "help": "Where the retain term is measured: with the adapter multiplied by this. `1` (the paper) holds the "
            "trained model to the reference on the retain rows; `-1` (mirror consistency) holds θ_ref − ΔW, on whose "
            "side the forget model lies."
        },
    )
    retain_kl_both_signs: bool = field(
        default=False,
        metadata={
            "help": "Whether to measure the retain term on both sides of the reference: every other retain row at minus "
            "`retain_kl_scale`, in each epoch those that were not in the epoch before."
        },
    )
    retain_per_forget: int = field(
        default=1,
        metadata={"help": "Retain rows that accompany each forget row. An epoch is one pass over the forget set."},
    )
    retain_sample_size: int = field(
        default=200,
        metadata={"help": "Retain rows that are sampled from the model before training where there is no retain set."},
    )
    retain_sample_temperature: float = field(default=1.0, metadata={"help": "Temperature at which they are sampled."})
    paraphrases: str | None = field(
        default=None,
        metadata={
            "help": "Column of the forget set with paraphrased answers (a text or a list of texts a row). Each becomes a "
            "further forget row of the same prompt."
        },
    )
    paraphrased_questions: str | None = field(
        default=None,
        metadata={
            "help": "Column of the forget set with paraphrased questions. Each becomes a further forget row of the same "
            "answer."
        },
    )
    wrong_answers: str | None = field(
        default=None,
        metadata={
            "help": "Column of the forget set with wrong answers. They join the retain rows: the model is held to the "
            "reference on them."
        },
    )
    reference_cache: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to compute what the reference says of each row once and read it from a memory-mapped file "
            "in `output_dir` ever after, instead of running the reference in every step. If not set, it is used where "
            "the rows are met twice or more and the file takes at most a tenth of the free disk."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to switch off the dropout of the base model, so that the retain term starts at zero. "
            "`lora_dropout` stays as configured."
        },
    )
    learning_rate: float = field(
        default=2e-4, metadata={"help": "Initial learning rate of AdamW. LoRA wants 1e-4 to 1e-3."}
    )
    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the forget set."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Steps over which the learning rate rises to its value; below 1, their share of all steps."},
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Optimiser steps between two logs. Unlearning runs are short."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to train in bf16 mixed precision. If not set, it is used where an accelerator supports it, "
            "and not on CPU."
        },
    )

    train_all_weights = False  # an option of some methods; the others train an adapter
    pushes_result = False  # whether `push_to_hub` uploads a result, and nothing before there is one

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _accelerator_has_bf16()
        super().__post_init__()
        self._check_values()
        self._refuse_unsupported()

    def _check_values(self) -> None:
        if self.retain_kl_weight < 0:
            raise UnlearningError(
                f"retain_kl_weight={self.retain_kl_weight} would push the model away from the reference on the retain "
                "rows. Use 0 to leave the retain term out, or a positive weight (the paper uses 1)."
            )
        if self.retain_nll_weight < 0:
            raise UnlearningError(
                f"retain_nll_weight={self.retain_nll_weight} would make the model forget the retain rows. Use 0 to leave "
                "the term out, or a positive weight."
            )
        if self.retain_per_forget < 1:
            raise UnlearningError(
                f"retain_per_forget={self.retain_per_forget} is not possible. Use 1 or more, or retain_kl_weight=0 to "
                "leave the retain set out."
            )
        if self.retain_sample_size < 1:
            raise UnlearningError(f"retain_sample_size={self.retain_sample_size} is not possible. Use 1 or more.")
        if not 0 < self.retain_sample_temperature < float("inf"):
            raise UnlearningError(
                f"retain_sample_temperature={self.retain_sample_temperature} is not possible. Use a finite number above 0."
            )
        if self.wrong_answers is not None and (self.retain_kl_weight == 0 or self.retain_nll_weight > 0):
            raise UnlearningError(
                "wrong_answers are held to the reference by the retain KL, and the retain cross-entropy would teach them "
                "to the model. Set retain_kl_weight above 0 and retain_nll_weight=0, or leave the option out."
            )

    @property
    def uses_retain(self) -> bool:
        """Whether the method needs the retain set."""
        return self.retain_kl_weight > 0 or self.retain_nll_weight > 0

    @property
    def needs_retain_reference(self) -> bool:
        """Whether the reference is asked about the retain rows."""
        return self.retain_kl_weight > 0

    @property
    def needs_forget_reference(self) -> bool:
        """Whether the reference is asked about the forget rows."""
        return False

    @property
    def cached_sets(self) -> list[str]:
        """The sets on which the reference is asked, and says the same in every epoch."""
        return ["retain"] * self.needs_retain_reference + ["forget"] * self.needs_forget_reference

    @property
    def keeps_forget_hidden(self) -> bool:
        """Whether hidden states of the reference on the forget rows are needed, instead of log-probabilities."""
        return False

    def _refuse_unsupported(self) -> None:
        refused: dict[str, tuple[bool, str]] = {
            "packing": (self.packing, "it would mix rows of the two sets; set packing=False"),
            "padding_free": (self.padding_free, "rows are scored one by one; set padding_free=False"),
            "loss_type": (self.loss_type != "nll", "the method defines the loss; leave loss_type='nll'"),
            "label_smoothing_factor": (
                self.label_smoothing_factor > 0,
                "it smooths the labels that are to be memorised; set label_smoothing_factor=0",
            ),
            "completion_only_loss": (
                self.completion_only_loss is False,
                "prompts are never scored here; leave it unset, or pass whole texts in a `text` column",
            ),
            "assistant_only_loss": (
                self.assistant_only_loss,
                "conversations are split into one row for each assistant turn, so it is not needed; leave it False",
            ),
            "dataset_kwargs": (
                bool((self.dataset_kwargs or {}).get("skip_prepare_dataset")),
                "both sets must be tokenised the same way; remove skip_prepare_dataset",
            ),
            "truncation_mode": (
                self.truncation_mode != "keep_start",
                "it would cut off the prompt an answer belongs to; leave truncation_mode='keep_start'",
            ),
            "average_tokens_across_devices": (
                not self.average_tokens_across_devices,
                "losses are normalised over the batch of all processes; leave it True",
            ),
            "dataloader_persistent_workers": (
                self.dataloader_persistent_workers,
                "its workers would not see the new pairing of each epoch; set it to False",
            ),
            "push_to_hub": (
                self.push_to_hub and not self.pushes_result,
                "it would upload every checkpoint, and those hold what is to be forgotten; train without it, then "
                "upload the folder written by save_forget_model or save_forget_adapter",
            ),
            "load_best_model_at_end": (
                self.load_best_model_at_end and self.metric_for_best_model in (None, "loss", "eval_loss"),
                "on a forget set the lowest loss is the most trained adapter and the highest the least trained one, "
                "and neither is the best; name another metric_for_best_model or turn it off",
            ),
        }
        for option, (is_set, reason) in refused.items():
            if is_set:
                raise UnlearningError(f"`{option}` is not supported by {type(self).__name__}: {reason}.")

    def provenance(self) -> dict[str, Any]:
        """Training options that a reader of the result needs, JSON-ready."""
        names = (
            "retain_kl_weight",
            "retain_nll_weight",
            "retain_kl_scale",
            "retain_kl_both_signs",
            "retain_per_forget",
            "paraphrases",
            "paraphrased_questions",
            "wrong_answers",
            "learning_rate",
            "num_train_epochs",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "seed",
        )
        return {name: getattr(self, name) for name in names}


def _accelerator_has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type in ("xpu", "npu", "hpu")
