"""WMDP, MMLU and any other multiple-choice task of lm-evaluation-harness."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure, not_computed
from hf_unlearn.evaluation.protocols.rows import check_limit


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TASKS = ("wmdp_bio", "wmdp_chem", "wmdp_cyber", "mmlu")
CPU_BATCH_SIZE = 16

_NORMAL_QUANTILE = 1.96  # of 95 %, two-sided


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = TASKS,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    include_path: str | Path | None = None,
) -> dict[str, Figure]:
    """
    Accuracy on tasks of lm-evaluation-harness, which holds the prompts and the way they are scored.

    The model is evaluated as it is: with the adapters that are active, on its device, without chat template. Its mode
    and the tokenizer are left as they were; the random generators are seeded by the harness.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        tasks (sequence of `str`): Names of tasks or groups. Defaults to the three parts of WMDP (Li et al., arXiv
            2403.03218) and MMLU, whose questions come from the Hub. A group and a task of it cannot be asked for
            together.
        num_fewshot (`int`, *optional*): Examples before each question. Defaults to those of the task, 0 for WMDP and
            MMLU.
        limit (`int`, *optional*): Questions per task; a group of n tasks has n times as many. All if `None`.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`): Questions per batch. `"auto"` starts from 64
            and halves it when the accelerator's memory runs out; on a CPU, where nothing stops it, it is 16.
        include_path (`str` or `Path`, *optional*): Folder with further task definitions (YAML), e.g. over local files.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: lm-evaluation-harness is missing or cannot run the tasks, or `limit` is
            below 1.

    Returns:
        `dict[str, Figure]`: accuracy by name of the task, with an interval of 1.96 standard errors either way.
    """
    check_limit(limit)
    lm_eval = import_harness()
    if batch_size == "auto" and model.device.type == "cpu":
        batch_size = CPU_BATCH_SIZE
    was_training = model.training
    try:
        results = lm_eval.simple_evaluate(
            lm_eval.models.huggingface.HFLM(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
            ),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            task_manager=lm_eval.tasks.TaskManager(include_path=include_path and Path(include_path).expanduser()),
        )
    except (KeyError, ValueError, OSError) as error:
        raise UnlearningError(
            f"lm-evaluation-harness cannot run the tasks {', '.join(tasks)}: {error}. Check the names and the network; "
            "without one, give task definitions over local files with include_path."
        ) from error
    finally:
        model.train(was_training)
    return {task: _accuracy(results, task, lm_eval.__version__) for task in tasks}


def import_harness() -> Any:
    """The package, which is imported where it is needed only; an [`UnlearningError`] says how to install it."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UnlearningError(
            f"WMDP and MMLU need lm-evaluation-harness, which cannot be imported ({error}). Install it with "
            '`pip install "hf_unlearn[harness]"`.'
        ) from error
    return lm_eval


def _accuracy(results: dict[str, Any], task: str, version: str) -> Figure:
    scores = results["results"].get(task, {})
    if "acc,none" not in scores:
        return not_computed(f"lm-evaluation-harness reports no accuracy under the name {task}")
    value, error, count = float(scores["acc,none"]), scores.get("acc_stderr,none"), scores["sample_len"]
    note = f"accuracy, {results['n-shot'][task]}-shot, lm-evaluation-harness {version}"
    if not isinstance(error, float):  # "N/A" for a single question
        return Figure(value, count, note=note)
    margin = _NORMAL_QUANTILE * float(error)
    return Figure(value, count, value - margin, value + margin, f"{note}; interval of ±1.96 of its standard errors")
