"""Curves over α for the tools that training logs go to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    get_reporting_integration_callbacks,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import Evaluation


STEPS_PER_ALPHA = 1000  # the tools have whole steps only
AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "trackio": is_trackio_available,
    "wandb": is_wandb_available,
}
TOOLS = tuple(AVAILABLE)


def check_tools(tools: Sequence[str]) -> None:
    """Refuse tools that are not installed, before anything is computed."""
    for tool in tools:
        if not AVAILABLE[tool]():
            raise UnlearningError(f"--report_to {tool} needs {tool}. Install it: pip install {tool}")


def report_curves(tools: Sequence[str], evaluations: Sequence[Evaluation], folder: Path, run_name: str) -> None:
    """
    Log every figure at every α through the callbacks of transformers: `eval/<figure>` and `eval/alpha` at step 1000·α.

    Args:
        tools (sequence of `str`): `"tensorboard"`, `"trackio"` and `"wandb"`.
        evaluations (sequence of [`Evaluation`]): At each α, by rising α.
        folder (`Path`): Where tensorboard keeps its files, under `runs`, unless `TENSORBOARD_LOGGING_DIR` says otherwise.
        run_name (`str`): Name of the run, for trackio and wandb.
    """
    if not tools:
        return
    args = TrainingArguments(output_dir=str(folder), run_name=run_name, report_to="none")
    state, control = TrainerState(), TrainerControl()
    for kind in get_reporting_integration_callbacks(list(tools)):
        callback = kind()
        callback.on_train_begin(args, state, control, model=None)
        for evaluation in evaluations:
            state.global_step = round(STEPS_PER_ALPHA * evaluation.alpha)
            logs = {f"eval_{name}": value for name, value in evaluation.summary().items() if value is not None}
            callback.on_log(args, state, control, logs=logs, model=None)
        callback.on_train_end(args, state, control, model=None)
