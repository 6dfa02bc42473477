"""Relearning: a little training on a part of the forget rows, and what comes back of the others."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_unlearn.audit.attack import Attack
from hf_unlearn.audit.case import Case
from hf_unlearn.audit.findings import Measurement
from hf_unlearn.data.tokenization import IGNORED, encode_pair


WATCHED = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # steps


class Relearning(Attack):
    """LoRA on a part of the forget rows."""

    name = "relearning"
    title = "Relearning"
    what = "The model is fine-tuned with LoRA on a part of the forget rows; watched are the forget rows that are not trained on."
    axis = "Optimiser step"

    def obstacle(self, case: Case) -> str | None:
        count = len(case.rows["forget"])
        return f"it trains on some forget rows and watches others, and there is {count}" if count < 2 else None

    def plan(self, case: Case) -> str:
        trained = self.trained(case)
        return (
            f"train {case.options.relearn_steps} steps on {len(trained)} of {len(case.rows['forget'])} forget rows, and "
            f"watch the others at steps {', '.join(map(str, watched(case.options.relearn_steps)))}"
        )

    def trained(self, case: Case) -> list[int]:
        """Places of the forget rows that are trained on, drawn by the seed."""
        count = len(case.rows["forget"])
        chosen = min(max(1, int(count * case.options.relearn_share)), count - 1)
        return sorted(random.Random(case.options.seed).sample(range(count), chosen))

    def measure(self, case: Case) -> list[Measurement]:
        trained = self.trained(case)
        unseen = [place for place in range(len(case.rows["forget"])) if place not in trained]
        found: list[Measurement] = []

        def look(step: int) -> None:
            variant = f"{step} steps" if step != 1 else "1 step"
            for name in case.rows:
                positions = unseen if name == "forget" else None
                found.append(case.ask(variant, name, positions=positions, generate=False, x=step))
            learned = case.ask(variant, "forget", positions=trained, generate=False, x=step)
            found.append(Measurement(variant, "trained on", trained, learned.values, x=step))

        look(0)
        if case.base is not None:
            found.append(
                Measurement(
                    "base", "forget", unseen, {"probability": case.of_base["forget"].at("probability", unseen)}
                )
            )
        with untouched(case.model):
            train(case, trained, look)
        return found

    def judged(self, measurements: list[Measurement]) -> list[Measurement]:
        return [each for each in super().judged(measurements) if each.x]


def watched(steps: int) -> list[int]:
    """The steps that are watched: 0, 1, 2, 5, 10 and so on, and the last one."""
    return [*(step for step in WATCHED if step < steps), steps]


def train(case: Case, positions: list[int], look: Any) -> None:
    """
    Fine-tune on forget rows; `look` is called at the watched steps with the number of the step.

    Args:
        case ([`Case`]): The case. Its model has the adapter while `look` runs, and none afterwards.
        positions (`list[int]`): Places of the rows.
        look (`Callable`): Gets the step.
    """
    options, steps = case.options, watched(case.options.relearn_steps)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in steps:
                look(state.global_step)

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=options.relearn_steps,
            learning_rate=options.relearn_learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=min(options.relearn_batch_size, len(positions)),
            completion_only_loss=True,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=case.model.device.type == "cpu",
            seed=options.seed,
        )
        lora = LoraConfig(
            r=options.relearn_rank,
            lora_alpha=2 * options.relearn_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        trainer = SFTTrainer(
            case.model,
            args,
            train_dataset=_encoded(case, positions),
            processing_class=case.tokenizer,
            peft_config=lora,
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            trainer.model.unload()


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Take back what a training leaves on a model besides weights: flags, a forward of its own, gradients."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    own, training, use_cache = dict(model.__dict__), model.training, model.config.use_cache
    try:
        yield
    finally:
        model.__dict__.clear()
        model.__dict__.update(own)
        model.config.use_cache = use_cache
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        model.train(training)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def _encoded(case: Case, positions: list[int]) -> datasets.Dataset:
    """The rows as tokens, of which the answer is trained on."""
    rows = []
    for place in positions:
        row = case.rows["forget"][place]
        pair = encode_pair(row.prompt, row.completion, case.tokenizer, case.options.max_length)
        mask = [int(label != IGNORED) for label in pair["labels"]]
        rows.append({"input_ids": pair["input_ids"], "completion_mask": mask})
    return datasets.Dataset.from_list(rows)
