"""The trainer that every unlearning method shares."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import logging
from trl import SFTTrainer

from hf_unlearn.data.checks import data_hash, drop_untrainable
from hf_unlearn.data.pairing import PairCollator, PairedDataset
from hf_unlearn.data.sampling import write_rows
from hf_unlearn.errors import UnlearningError, explaining
from hf_unlearn.extrapolation.fingerprint import fingerprint_files_of, fingerprint_model, is_quantised
from hf_unlearn.extrapolation.linearity import check_lora_config, check_target_modules
from hf_unlearn.extrapolation.live import adapter_scale, check_tokens_in_order, is_sharded
from hf_unlearn.extrapolation.provenance import package_versions, write_provenance
from hf_unlearn.extrapolation.sharded import whole_adapter
from hf_unlearn.lm_head import LMHead, add_score_fn_to_forward
from hf_unlearn.quantisation import check_quantization, prepare_quantised
from hf_unlearn.trainer.asks_reference import AsksReference
from hf_unlearn.trainer.batch import ForgetTokens, MicroBatch, Reference
from hf_unlearn.trainer.evaluation_callback import EvaluationCallback
from hf_unlearn.trainer.full_training import check_full_training, frozen_copy
from hf_unlearn.trainer.method_hooks import MethodHooks
from hf_unlearn.trainer.processes import EvenSampler, check_launch
from hf_unlearn.trainer.reference_cache import ReferenceCache
from hf_unlearn.trainer.saving import SavesWhole
from hf_unlearn.trainer.sets import SAMPLED_FILE, TrainingSets, load_reference, sample_retain_rows, tokenized
from hf_unlearn.trainer.unlearning_config import UnlearningConfig


logger = logging.get_logger(__name__)

NOTE = """# Unlearned {kind} of `{base}`, by the method `{method}`

Evaluate it before it is used: `hf-unlearn eval`. Whoever has the base model as well can subtract what was changed, and
so find out what was to be forgotten.
"""


class _RunCallback(TrainerCallback):
    """Moves what the trainer holds besides the model along with the run, also when it is resumed."""

    def __init__(self, trainer: UnlearningTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        evaluates = self.trainer.eval_dataset or self.trainer.evaluation_callbacks
        if args.eval_strategy != "no" and not evaluates:
            raise UnlearningError(
                f"eval_strategy={args.eval_strategy.value!r} has nothing to evaluate. Pass `eval_dataset`, add an "
                "`EvaluationCallback`, or set eval_strategy='no'."
            )
        seen = [log["num_tokens"] for log in state.log_history if "num_tokens" in log]
        self.trainer._total_train_tokens = seen[-1] if seen else 0
        self.trainer.prepare_run()
        self.trainer._start_reference_cache()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.reference_cache = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate forwards `set_epoch` to a dataset in one process, but not in several.
        self.trainer.train_dataset.set_epoch(int(state.epoch or 0))


class UnlearningTrainer(MethodHooks, AsksReference, SavesWhole, SFTTrainer):
    """
    Base class of the unlearning methods: two sets, one gradient forward, one reference.

    Each step runs the forget rows and the retain rows through the model together. The reference is the same model with
    its adapter switched off; its pass over the retain rows takes no gradient and no second copy of the weights. Where all
    weights are trained it is a frozen copy. A method subclasses this and defines [`~UnlearningTrainer.forget_loss`]; the
    retain terms, the normalisation over the global batch and the logs are here.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Model to unlearn from: a Hub id, a local folder or a causal LM without adapters.
        args ([`UnlearningConfig`], *optional*):
            Configuration of the run.
        forget_dataset (`datasets.Dataset`, `str` or list of `dict`):
            What must go. Rows may be prompt/completion (text or chat), `messages`, `text`, question/answer or
            instruction/output. A `str` is a local file or folder, a Hub id, or one of the sample sets
            (`"people/forget"`).
        retain_dataset (`datasets.Dataset`, `str` or list of `dict`, *optional*):
            What must stay, in any of the same shapes. If not given while the method has a retain term, retain rows are
            sampled from the model before training ([`~hf_unlearn.data.sampling.sample_retain_set`]).
        eval_dataset (the same, or a `dict` of such sets, *optional*):
            Evaluated by their answer loss. For the metrics of a protocol add an [`EvaluationCallback`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; loaded with the model's name if not given.
        peft_config ([`~peft.LoraConfig`], *optional*):
            LoRA adapter to train. Defaults to rank 16, `lora_alpha=32`, no dropout, on all linear layers but the LM
            head. None where all weights are trained.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning-rate scheduler.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantisation of a model given by name.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: an option or a row that cannot be used, before the model is loaded
            where possible and always before training.
    """

    _tag_names = ["hf_unlearn", "unlearning"]
    _name = "Unlearning"
    loss_is_scaled_for_ga = True  # normalised over the whole accumulated batch in `compute_loss`
    config_class = UnlearningConfig
    method = "unlearning"  # as `unlearning.json` calls it
    saved_note = NOTE  # README.md of what is saved

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: UnlearningConfig | None = None,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
    ) -> None:
        if args is None:
            args = self.config_class(output_dir=f"{_model_name(model).split('/')[-1]}-{self._name}")
        if not isinstance(args, self.config_class):
            raise UnlearningError(
                f"`args` is a {type(args).__name__}; {type(self).__name__} needs a {self.config_class.__name__}."
            )
        check_launch(args)
        if forget_dataset is None:
            raise UnlearningError("`forget_dataset` is required: the rows that must go.")
        self.uses_retain = args.uses_retain
        peft_config = self._checked_peft_config(model, peft_config, args, quantization_config)
        check_quantization(model, quantization_config, args.model_init_kwargs)
        if processing_class is None:
            processing_class = _load_tokenizer(model, args)
        sets = TrainingSets(forget_dataset, processing_class, args)
        self.forget_dataset = sets.forget
        alternates = self.make_alternates(self.forget_dataset, forget_dataset, processing_class, args)
        # `None` is refused where `eval_strategy` is set, and an `EvaluationCallback` has sets of its own.
        eval_dataset = self._prepare_eval_sets({} if eval_dataset is None else eval_dataset, processing_class, args)
        self.sampled_rows: datasets.Dataset | None = None
        if self.uses_retain and retain_dataset is None:
            model, args = load_reference(model, args, quantization_config)
            quantization_config = None  # it has been used
            retain_dataset = self.sampled_rows = sample_retain_rows(model, sets.forget, processing_class, args)
        if self.uses_retain:
            sets.add_retain(retain_dataset)
        for warning in sets.report.warnings():
            logger.warning(warning)
        self.data_report = sets.report
        self.retain_dataset = sets.retain
        self.wrong_dataset = sets.wrong

        with explaining(
            f"The model {_model_name(model)} cannot be loaded or given an adapter",
            "Check its folder or name, and the options that the reason names.",
        ):
            super().__init__(
                model=model,
                args=args,
                train_dataset=self.forget_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        base = self.base_model
        if peft_config is not None:
            check_target_modules(base, peft_config)
            if self.scales_retain_rows:
                check_tokens_in_order(base)
        if args.disable_dropout:
            _disable_base_dropout(self.model)
        if is_quantised(base):
            prepare_quantised(self.peft_model)
        self._frozen_copy = frozen_copy(base) if args.train_all_weights and self.needs_reference else None
        add_score_fn_to_forward(base)
        self.base_fingerprint = fingerprint_model(self.peft_model) or fingerprint_files_of(base)
        self.train_dataset = PairedDataset(
            self._forget_rows_to_train(),
            sets.held,
            args.retain_per_forget if self.uses_retain else 0,
            seed=args.seed,
            alternates=alternates,
            instead=self.alternates == "instead",
        )
        self.data_collator = PairCollator(self._tokenizer.pad_token_id, args.pad_to_multiple_of)
        self.add_callback(_RunCallback(self))
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._is_evaluating = False
        self.reference_cache: ReferenceCache | None = None

    # ---- Construction ----

    @property
    def peft_model(self) -> PeftModel:
        """
        The adapter model without the wrappers of DDP, DeepSpeed and the like; the model itself where all weights are
        trained.
        """
        return self.accelerator.unwrap_model(self.model)

    @property
    def base_model(self) -> PreTrainedModel:
        """The causal LM, without its adapter."""
        model = self.peft_model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _checked_peft_config(
        self,
        model: str | PreTrainedModel,
        peft_config: PeftConfig | None,
        args: UnlearningConfig,
        quantization_config: BitsAndBytesConfig | None,
    ) -> LoraConfig | None:
        if isinstance(model, PeftModel):
            raise UnlearningError(
                "`model` already carries an adapter, so it is not clear what the reference is. Merge it first: "
                "`model = model.merge_and_unload()`, save the result, and pass that."
            )
        if args.train_all_weights:
            check_full_training(model, peft_config, quantization_config)
            return None
        if peft_config is None:
            return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        check_lora_config(peft_config)
        return copy.deepcopy(peft_config)  # PEFT writes into it

    def _prepare_eval_sets(self, sets: Any, tokenizer: PreTrainedTokenizerBase, args: UnlearningConfig) -> Any:
        if isinstance(sets, dict):
            return {name: self._prepare_eval_sets(rows, tokenizer, args) for name, rows in sets.items()}
        return drop_untrainable(tokenized(sets, "evaluation set", tokenizer, args))

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        # The one tokenisation policy of this package in place of SFTTrainer's, also for sets passed to `evaluate`.
        return self._prepare_eval_sets(dataset, processing_class, args)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels", "forget", "alternate", "retain"]

    def _get_train_sampler(self, train_dataset: PairedDataset | None = None) -> Sampler[int]:
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.world_size == 1:
            return sampler
        rows = self.args.train_batch_size * self.args.world_size
        return EvenSampler(sampler, self.train_dataset, self.args.data_seed, rows)

    # ---- One step ----

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch=None):
        # The scale must still be in place when gradient checkpointing runs the forward again during the backward.
        with self._retain_rows_scaled(inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    @property
    def scales_retain_rows(self) -> bool:
        """Whether the retain term is measured elsewhere than at the trained adapter."""
        return self.uses_retain and (self.args.retain_kl_scale != 1.0 or self.args.retain_kl_both_signs)

    @contextmanager
    def _retain_rows_scaled(self, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
        """Multiply the adapter by `retain_kl_scale` on the retain rows of the batch, in one and the same forward."""
        if not self.scales_retain_rows:
            yield
            return
        rows = inputs["rows"]
        scale = torch.full(rows.shape, self.args.retain_kl_scale, device=rows.device)
        if self.args.retain_kl_both_signs:
            scale = torch.where((rows + self.train_dataset.epoch) % 2 == 0, scale, -scale)
        scale = torch.where(inputs["is_forget"] | inputs["is_alternate"], 1.0, scale).to(self.accelerator.device)
        with adapter_scale(self.peft_model, scale[:, None].expand(inputs["input_ids"].shape)):
            yield

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "is_forget" not in inputs:  # an evaluation set
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = MicroBatch(inputs)
        reference = self._reference_of(model, batch)
        self._probe(model, batch)

        def score(hidden: torch.Tensor, head: LMHead) -> tuple[Any, ...]:
            hidden = self.activations(hidden)[:, :-1]
            forget = self.score_forget(head, hidden[batch.forget_at], batch.forget_targets, reference)
            alternate, retain = None, ({}, None)
            if self.alternates == "beside":
                alternate = self.score_alternate(head, hidden[batch.alternate_at], batch.alternate_targets)
            if self.uses_retain:
                retain = self.score_retain(head, hidden[batch.retain_at], batch.retain_targets, reference)
            return *forget, alternate, *retain

        log_probs, forget_is_top1, alternate, retain_terms, retain_is_top1 = model(
            **batch.model_inputs, score_fn=score
        )
        forget_loss = self.forget_loss(self._forget_tokens(batch, log_probs, alternate, reference))

        num_forget, num_retain = num_items_in_batch.clamp(min=1)
        loss = self.forget_weight * forget_loss.sum() / num_forget
        for name, term in retain_terms.items():
            loss = loss + self.retain_weights[name] * term.sum() / num_retain
        accuracies = {"forget_token_accuracy": forget_is_top1, "retain_token_accuracy": retain_is_top1}
        self._add_to_logs(
            **{self.forget_loss_name: forget_loss.sum()},
            **{name: term.sum() for name, term in retain_terms.items()},
            **{name: is_top1.sum() for name, is_top1 in accuracies.items() if is_top1 is not None},
            forget_items=self._num_forget_items(batch.forget_at.sum(1)),
            forget_tokens=len(batch.forget_targets),
            retain_tokens=len(batch.retain_targets) if self.uses_retain else 0,
            num_tokens=inputs["attention_mask"][(inputs["labels"] != -100).any(1)].sum(),
        )
        # The counts are those of all processes, and DDP averages gradients over the processes.
        return loss * self.accelerator.num_processes

    def _forget_tokens(
        self, batch: MicroBatch, log_probs: torch.Tensor, alternate: torch.Tensor | None, reference: Reference | None
    ) -> ForgetTokens:
        tokens = ForgetTokens(log_probs, batch.forget_rows)
        if reference is not None and reference.forget is not None:
            tokens = replace(tokens, reference_log_probs=reference.forget[:, 0])
        if alternate is not None:
            asked = None if reference is None else reference.alternate_log_probs
            others = ForgetTokens(alternate, batch.alternate_rows, asked)
            tokens = replace(tokens, alternate=others)
        return tokens

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """
        What the forget and the retain losses are divided by, shape `(2,)`: the answer tokens of the forget rows (or those
        rows, see `forget_reduction`) and of the retain rows in the whole batch of all processes.
        """
        if not batch_samples or "is_forget" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for inputs in batch_samples:
            per_row = (inputs["labels"][:, 1:] != -100).sum(1)
            is_retain = ~(inputs["is_forget"] | inputs["is_alternate"])
            forget = self._num_forget_items(per_row[inputs["is_forget"]])
            counts += torch.stack([forget, per_row[is_retain].sum()]).to(device)
        return self.accelerator.reduce(counts, "sum")

    def _num_forget_items(self, tokens_per_row: torch.Tensor) -> torch.Tensor:
        """Tokens or rows that the forget loss is averaged over; a row that only fills a batch has no tokens."""
        return (tokens_per_row > 0).sum() if self.forget_reduction == "row" else tokens_per_row.sum()

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # fp16 meets infinite gradients while it searches for its loss scale, and skips those steps itself.
        if grad_norm is not None and not math.isfinite(grad_norm) and not self.args.fp16:
            raise FloatingPointError(
                f"The gradient norm is {grad_norm} at step {self.state.global_step + 1}, so training stopped before "
                f"the step was taken; earlier checkpoints in {self.args.output_dir} are intact. Lower the learning "
                "rate, or check the base model for NaN weights."
            )
        return grad_norm

    # ---- Logs ----

    def _add_to_logs(self, **sums: torch.Tensor | float) -> None:
        for name, value in sums.items():
            self._sums[name] += value.detach().float() if isinstance(value, torch.Tensor) else value

    def _collect_logs(self) -> dict[str, float]:
        """Token means since the last log, over all processes."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        values = torch.stack([torch.as_tensor(self._sums[name], dtype=torch.float64) for name in names])
        values = self.accelerator.reduce(values.to(self.accelerator.device, torch.float32), "sum").tolist()
        sums = dict(zip(names, values, strict=True))
        self._sums.clear()
        self._total_train_tokens += int(sums.pop("num_tokens"))
        tokens = {set_name: sums.pop(f"{set_name}_tokens") for set_name in ("forget", "retain")}
        forget_items = sums.pop("forget_items")
        logs = {}
        for name, value in sums.items():
            count = tokens["retain" if "retain" in name else "forget"]
            if name == self.forget_loss_name:
                count = forget_items
            if count > 0:
                logs[name] = value / count
        return logs | {"num_tokens": self._total_train_tokens}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs = logs | self._collect_logs()
            super().log(logs, start_time)
            return
        # With several evaluation sets SFTTrainer writes the extra metrics of each over those of the one before.
        prefix = next((key.removesuffix("_loss") for key in logs if key.endswith("_loss")), "eval")
        for name, values in self._metrics["eval"].items():
            logs[f"{prefix}_{name}"] = sum(values) / len(values)
        self._metrics["eval"].clear()
        super().log(logs, start_time)

    # ---- Evaluation ----

    @property
    def evaluation_callbacks(self) -> list[EvaluationCallback]:
        """The callbacks that evaluate a protocol."""
        return [item for item in self.callback_handler.callbacks if isinstance(item, EvaluationCallback)]

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback; an [`EvaluationCallback`] goes before all others, which may read its metrics."""
        super().add_callback(callback)
        if isinstance(callback, EvaluationCallback):
            callbacks = self.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ):
        """The losses of the evaluation sets, and what an [`EvaluationCallback`] adds."""
        if self._is_evaluating:  # one of several evaluation sets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        for callback in self.evaluation_callbacks:
            callback.is_due = True
        self._is_evaluating = True
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._is_evaluating = False
        if not metrics:  # no evaluation set, so no event yet
            self.model.eval()
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- Saving ----

    @property
    def saved_kind(self) -> str:
        """What is saved: `"adapter"` or `"model"`."""
        return "model" if self.args.train_all_weights else "adapter"

    def provenance(self) -> dict[str, Any]:
        """What `unlearning.json` says of a saved adapter or model: base, data, training options, versions."""
        config = self.base_model.config
        quantization = config.to_dict().get("quantization_config")
        report = self.data_report.to_dict()
        sets = {"forget": self.forget_dataset, "retain": self.retain_dataset, "wrong_answers": self.wrong_dataset}
        return {
            "method": self.method,
            "kind": self.saved_kind,
            "base": {
                "id": config._name_or_path,
                "revision": getattr(config, "_commit_hash", None),
                "fingerprint": self.base_fingerprint,
                **({"quantization_config": quantization} if quantization else {}),
            },
            "data": {
                name: {"rows": len(rows), "sha256": data_hash(rows)} for name, rows in sets.items() if rows is not None
            },
            "data_report": report,
            "training": self.args.provenance(),
            "versions": package_versions(),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the adapter (or the model, where all weights are trained), whole, whatever the layout of the processes. Every
        process has to call it.
        """
        if not is_sharded(self.peft_model):
            super().save_model(output_dir, _internal_call)
            return
        # transformers would gather the frozen base as well, or, depending on the launch configuration, save no adapter.
        adapter = whole_adapter(self.peft_model)
        if self.args.should_save:
            self._save(output_dir, adapter)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self.saving_to(output_dir) as folder:
            super()._save(str(folder), state_dict)
            if not self.args.should_save:
                return
            write_provenance(folder, self.provenance())
            if self.sampled_rows is not None:
                write_rows(folder / SAMPLED_FILE, self.sampled_rows)
            note = self.saved_note.format(
                kind=self.saved_kind, base=self.base_model.config._name_or_path, method=self.method
            )
            (folder / "README.md").write_text(note, encoding="utf-8")

    def push_to_hub(self, *args, **kwargs) -> None:
        """Refused: what was unlearned is to be evaluated before it is published."""
        raise UnlearningError(
            "`push_to_hub` would upload a result that nobody has evaluated. Save it with save_model, evaluate it with "
            "`hf-unlearn eval`, and upload the folder."
        )

    def create_model_card(self, *args, **kwargs) -> None:
        """Written with the adapter itself, see `_save`; TRL's card describes a model that was fine-tuned."""


def _disable_base_dropout(model: PeftModel) -> None:
    """Switch off the base model's dropout, that of attention included, and leave the adapter's alone."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _model_name(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else model.config._name_or_path


def _load_tokenizer(model: str | PreTrainedModel, args: UnlearningConfig) -> PreTrainedTokenizerBase:
    name = _model_name(model)
    revision = (args.model_init_kwargs or {}).get("revision")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UnlearningError(
            f"No tokenizer could be loaded for {name!r} ({error}). Pass one as `processing_class`."
        ) from error
