"""How a trainer asks the reference: the adapter switched off, a frozen copy, or what is cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from hf_unlearn.lm_head import LMHead, forward_and_score
from hf_unlearn.trainer.batch import MicroBatch, Reference
from hf_unlearn.trainer.reference_cache import ReferenceCache, fill_cache, free_disk, num_local_processes, plan_cache


class AsksReference:
    """The part of [`UnlearningTrainer`] that runs the reference."""

    # What another model says, that is the reference instead of this one; rows and options are those of this run.
    fixed_reference: ReferenceCache | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is asked about anything."""
        return self.args.needs_retain_reference or self.args.needs_forget_reference

    @property
    def reference_head(self) -> LMHead | None:
        """Head of the reference, where it is not the model's own."""
        return None if self._frozen_copy is None else LMHead.of(self._frozen_copy)

    def _reference_of(self, model: nn.Module, batch: MicroBatch) -> Reference | None:
        """What the reference says of the rows for which it is asked."""
        if self.reference_cache is not None:
            return self.reference_cache.of(batch)
        if not self.needs_reference:
            return None
        is_retain = ~(batch.is_forget | batch.is_alternate)
        if not self.args.needs_forget_reference:
            return self._reference_pass(model, batch.only(is_retain))
        return self._reference_pass(model, batch if self.args.needs_retain_reference else batch.only(~is_retain))

    def _reference_pass(self, model: nn.Module, rows: MicroBatch) -> Reference:
        """Run the untouched model (no gradient, no dropout) over rows."""

        def score(hidden: torch.Tensor, head: LMHead) -> tuple[torch.Tensor | None, ...]:
            hidden = self.activations(hidden)[:, :-1]
            forget = alternate = None
            if self.args.needs_forget_reference:
                forget = self.reference_of_forget(head, hidden[rows.forget_at], rows.forget_targets)
            if self.alternates == "beside":
                alternate = self.score_alternate(head, hidden[rows.alternate_at], rows.alternate_targets)
            return hidden[rows.retain_at], forget, alternate

        with torch.no_grad(), self._reference_live(model) as reference:
            return Reference(*reference(**rows.model_inputs, score_fn=score))

    @contextmanager
    def _reference_live(self, model: nn.Module) -> Iterator[Callable[..., Any]]:
        """The model with its adapter off, or the frozen copy."""
        if self._frozen_copy is not None:
            with self.accelerator.autocast():
                yield partial(forward_and_score, self._frozen_copy)
        else:
            with self.peft_model.disable_adapter(), _eval_mode(model):
                yield model

    def _start_reference_cache(self) -> None:
        """Fill the reference cache where it was asked for or pays."""
        self.reference_cache = self.fixed_reference
        if self.fixed_reference is not None:
            return
        sets = self.args.cached_sets
        if self.args.reference_cache is False or not sets:
            return
        machines = self.accelerator.num_processes // num_local_processes(self.accelerator)
        hidden_size = self.base_model.config.get_text_config().hidden_size
        width = hidden_size if self.args.keeps_forget_hidden else 1
        plan = plan_cache(self.train_dataset, sets, self._epochs_to_come(), hidden_size, machines, width)
        pays = self.args.reference_cache or plan.pays(free_disk(self.args.output_dir))
        if not broadcast_object_list([pays])[0]:  # free disks differ between machines
            return
        self.reference_cache = fill_cache(
            plan,
            self.train_dataset,
            partial(self._reference_pass, self.model_wrapped),
            self.data_collator,
            self.accelerator,
            self.args.output_dir,
            batch_size=self.args.per_device_train_batch_size * self.args.retain_per_forget,
            progress=not self.args.disable_tqdm,
        )

    def _epochs_to_come(self) -> float:
        """Passes over the forget set that a run with its `max_steps` makes."""
        rows_a_step = self._train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return self.state.max_steps / math.ceil(len(self.forget_dataset) / rows_a_step)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
