"""Trains the tiny model by some baselines: `train_baselines.py OUTPUT_DIR MODEL_DIR BATCH_SIZE`, in any number of processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tiny import tiny_rows

from hf_unlearn.trainer.baselines import METHODS
from hf_unlearn.trainer.processes import leave_processes


RUNS = {
    "npo": {"retain_kl_weight": 1.0},
    "dpo": {},
    "idk": {},
    "undial": {},
    "rmu": {"rmu_retain_weight": 10.0},
    "pdu": {"dual_warmup_epochs": 0},
    "kl-all-weights": {"train_all_weights": True},
}


def run(output_dir: Path, model_dir: str, batch_size: int) -> None:
    """Train by each, and write the adapters, the logs and the dual variable."""
    for name, options in RUNS.items():
        trainer_class, config_class = METHODS[name.split("-")[0]]
        config = config_class(
            output_dir=str(output_dir / name),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=1e-3,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
            **options,
        )
        # 5 rows in batches of 4: the last batch of an epoch is filled up
        rows = {"forget_dataset": tiny_rows(5, seed=1), "retain_dataset": tiny_rows(7, seed=2)}
        trainer = trainer_class(model=model_dir, args=config, **rows)
        trainer.train()
        trainer.save_model()
        facts = {"logs": [log for log in trainer.state.log_history if "forget_loss" in log]}
        if name == "pdu":
            facts["dual"] = [trainer.dual.weight, trainer.dual.limit]
        (output_dir / f"{name}-{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    leave_processes()
