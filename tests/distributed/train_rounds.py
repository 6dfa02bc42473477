"""Trains the tiny model in rounds in as many processes as it is launched with: `train_rounds.py OUTPUT MODEL BATCH`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tiny import tiny_rows

from hf_unlearn import ExtrapolationConfig, train_in_rounds
from hf_unlearn.trainer.processes import leave_processes


def run(output_dir: Path, model_dir: str, batch_size: int) -> None:
    """Three rounds, the last of them in a second call."""
    config = ExtrapolationConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=batch_size,
        num_train_epochs=3,
        optim="sgd",
        learning_rate=0.3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )

    def first_two(trainer, number, checkpoint):
        if number == 3:
            raise InterruptedError
        trainer.train()

    rows = {"forget_dataset": tiny_rows(5, seed=1), "retain_dataset": tiny_rows(7, seed=2)}
    try:
        train_in_rounds(model_dir, config, **rows, rounds=3, train_round=first_two)
    except InterruptedError:
        train_in_rounds(model_dir, config, **rows, rounds=3, resume=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    leave_processes()
