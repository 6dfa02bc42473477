"""
Trains the tiny model in as many processes as it is launched with, saves everything that can be saved, resumes and fails:
`train_tiny.py OUTPUT_DIR MODEL_DIR BATCH_SIZE [ends-badly]`. Each process writes `facts-RANK.json` for the assertions.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_rows
from torch.distributed.tensor import DTensor

from hf_unlearn import EvaluationCallback, ExtrapolationConfig, ExtrapolationTrainer, custom_protocol
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import live, sharded
from hf_unlearn.trainer.processes import leave_processes


USES_DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
USES_FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"
# Everything of the loss that differs from the paper's, which the run in the NPO form has.
LEVERS = {"retain_kl_scale": -1.0, "memorization_temperature": 4.0, "retain_nll_weight": 1.0}
STEPS, MIDDLE, ALPHA = 6, 3, 2.0  # 15 rows in batches of 8 are two steps an epoch: the middle is within an epoch


def prepare_libraries() -> None:
    """What makes DeepSpeed and FSDP2 run on CPU in reasonable time."""
    if USES_DEEPSPEED:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compilation
    if USES_FSDP:  # which accelerate has on accelerators only
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def build(
    output_dir: Path, model_dir: str, batch_size: int, num_forget: int = 15, **options: Any
) -> ExtrapolationTrainer:
    config = ExtrapolationConfig(
        output_dir=str(output_dir),
        preset="paper",
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=1,  # the loss of a set is the mean of its batches' losses
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=not (USES_DEEPSPEED or USES_FSDP),
        bf16=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **options,
    )
    return ExtrapolationTrainer(
        model=model_dir,
        args=config,
        forget_dataset=tiny_rows(num_forget, seed=1),
        retain_dataset=tiny_rows(7, seed=2),
        eval_dataset={"forget": tiny_rows(5, seed=1)} if "eval_steps" in options else None,
        # few modules, as DeepSpeed's hooks take the longest here
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )


@contextmanager
def recorded(owner: Any, name: str, record: Callable[..., None]) -> Iterator[None]:
    """Call `record` with the arguments of every call of `owner.name`."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        record(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def gathered_numbers() -> Iterator[list[int]]:
    """The number of elements of every gathering of sharded weights in this context."""
    numbers: list[int] = []

    def zero(params, *args, **kwargs):
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        numbers.append(sum(getattr(param, "ds_numel", 0) for param in params))

    with recorded(DTensor, "full_tensor", lambda tensor, *args, **kwargs: numbers.append(tensor.numel())):
        if not USES_DEEPSPEED:
            yield numbers
            return
        import deepspeed

        with recorded(deepspeed.zero, "GatheredParameters", zero):
            yield numbers


def shapes(trainer: ExtrapolationTrainer) -> dict[str, list[int]]:
    """What this process holds of each weight of the base."""
    held = {}
    for name, parameter in trainer.peft_model.get_base_model().named_parameters():
        if "lora_" not in name:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            held[name.replace(".base_layer.", ".")] = list(local.shape)
    return held


def straight(output_dir: Path, model_dir: str, batch_size: int) -> tuple[ExtrapolationTrainer, dict[str, Any]]:
    """Train without interruption and save everything."""
    trainer = build(
        output_dir,
        model_dir,
        batch_size,
        **LEVERS,
        num_train_epochs=STEPS // 2,
        save_strategy="steps",
        save_steps=MIDDLE,
        eval_strategy="steps",
        eval_steps=MIDDLE,
    )
    sets = {"forget": tiny_rows(5, seed=1), "retain": tiny_rows(7, seed=2), "holdout": tiny_rows(3, seed=3)}
    sets = {name: Dataset.from_list(rows) for name, rows in sets.items()}
    protocol = custom_protocol(sets, chat=False, max_new_tokens=4)
    generate = not (USES_DEEPSPEED or USES_FSDP)
    trainer.add_callback(EvaluationCallback(trainer, protocol, generate=generate, batch_size=2))
    seen: list[list[int]] = []

    def record(model, inputs, *args, **kwargs):
        if "is_forget" in inputs:
            rows = ~inputs["is_forget"] & (inputs["labels"] != -100).any(1)
            seen.extend([token for token in row if token] for row in inputs["input_ids"][rows].tolist())

    passes: list[list[int]] = []
    with (
        recorded(trainer, "compute_loss", record),
        recorded(trainer, "_reference_pass", lambda model, rows: passes.append(rows.rows.tolist())),
    ):
        trainer.train()
    facts = {
        "processes": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "stage": trainer.model_wrapped.zero_optimization_stage() if USES_DEEPSPEED else None,
        "dtensors": any(isinstance(parameter, DTensor) for parameter in trainer.peft_model.parameters()),
        "shapes": shapes(trainer),
        "retain_rows": seen,
        "reference_passes": passes,
        "logs": [log for log in trainer.state.log_history if "retain_kl" in log],
        "evaluations": [
            {key: value for key, value in log.items() if not key.endswith(("runtime", "per_second"))}
            for log in trainer.state.log_history
            if any(key.startswith("eval_") for key in log)
        ],
    }
    trainer.save_model()
    with gathered_numbers() as numbers:
        trainer.save_forget_model(output_dir / "forget-model", alpha=ALPHA)
    trainer.save_forget_model(output_dir / "in-shards", alpha=ALPHA, dtype="bfloat16", max_shard_size="20KB")
    trainer.save_forget_adapter(output_dir / "forget-adapter", alpha=ALPHA)
    return trainer, facts | {"gathered": numbers, "shapes_after_saving": shapes(trainer)}


def message_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    try:
        function(*args, **kwargs)
    except UnlearningError as error:
        return str(error)
    return None


def save_on_a_full_disk(trainer: ExtrapolationTrainer, output_dir: Path) -> None:
    """The first process finds the disk full in the middle of a merge."""
    calls = 0

    def fail(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with recorded(live, "extrapolate_weight", fail), recorded(sharded, "extrapolate_weight", fail):
        trainer.save_forget_model(output_dir, alpha=ALPHA)


def failures(trainer: ExtrapolationTrainer, output_dir: Path) -> dict[str, Any]:
    """What this process says when the first one cannot save."""
    save = trainer.save_forget_model
    return {
        "no_op": message_of(save, output_dir / "no-op", alpha=1e-30),
        "not_empty": message_of(save, output_dir / "forget-model"),
        "adapter_not_empty": message_of(trainer.save_forget_adapter, output_dir / "forget-adapter"),
        "full_disk": message_of(save_on_a_full_disk, trainer, output_dir / "full-disk"),
    }


def resumed_and_npo(output_dir: Path, model_dir: str, batch_size: int) -> dict[str, Any]:
    """Go on from the middle of the run, and train with the other loss on rows for three of four batches."""
    options = LEVERS | {"num_train_epochs": STEPS // 2, "save_strategy": "no"}
    trainer = build(output_dir / "resumed", model_dir, batch_size, **options)
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{MIDDLE}"))
    trainer.save_model()
    options = {"memorization_loss": "npo", "max_steps": 2, "save_strategy": "no"}
    trainer = build(output_dir / "npo", model_dir, batch_size, num_forget=5, **options)
    trainer.train()
    trainer.save_model()
    return {"npo_logs": [log for log in trainer.state.log_history if "retain_kl" in log]}


def run(output_dir: Path, model_dir: str, batch_size: int, ends_badly: bool = False) -> dict[str, Any]:
    """All that one launch does."""
    trainer, facts = straight(output_dir, model_dir, batch_size)
    facts |= failures(trainer, output_dir) if facts["processes"] > 1 else {}
    facts |= resumed_and_npo(output_dir, model_dir, batch_size)
    (output_dir / f"facts-{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))
    if ends_badly:
        save_on_a_full_disk(trainer, output_dir / "full-disk")
    return facts


if __name__ == "__main__":
    prepare_libraries()
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), ends_badly="ends-badly" in sys.argv)
    leave_processes()
