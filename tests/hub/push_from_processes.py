"""Trains and pushes in as many processes as it is launched with: `push_from_processes.py OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import constants
from test_push_from_training import make

from hf_unlearn import UnlearningError
from hf_unlearn.hub import PushError
from hf_unlearn.trainer.processes import leave_processes


def run(folder: Path) -> None:
    """Train with an upload at the end, then try one that is refused and one that fails."""
    trainer = make(folder, ddp_backend="gloo", per_device_train_batch_size=2, save_strategy="no")
    trainer.train()
    for repo_id in ("others/x", "me/locked"):
        try:
            trainer.push_to_hub(repo_id=repo_id)
        except (UnlearningError, PushError) as error:
            print(f"{trainer.args.process_index}: {type(error).__name__}", flush=True)


if __name__ == "__main__":
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True  # read when they were imported
    run(Path(sys.argv[1]))
    leave_processes()
