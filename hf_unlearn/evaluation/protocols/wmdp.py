"""WMDP (arXiv 2403.03218): hazardous knowledge, as multiple choice, with MMLU as what must stay."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hf_unlearn.evaluation.batching import BatchSize
from hf_unlearn.evaluation.protocols.base import Protocol
from hf_unlearn.evaluation.protocols.harness import run_harness
from hf_unlearn.evaluation.protocols.rows import check_limit


def wmdp_protocol(
    limit: int | None = None, include_path: str | Path | None = None, batch_size: BatchSize = "auto"
) -> Protocol:
    """
    Accuracy on the three parts of WMDP and on MMLU, which is the utility, by lm-evaluation-harness.

    Args:
        limit (`int`, *optional*): Questions per task; all if `None`.
        include_path (`str` or `Path`, *optional*): Folder with task definitions over local files. Defaults to those of
            lm-evaluation-harness, over sets from the Hub.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`): Questions per batch, as of [`run_harness`].

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: a `limit` below 1.
    """
    check_limit(limit)
    benchmarks = partial(run_harness, limit=limit, batch_size=batch_size, include_path=include_path)
    return Protocol(
        "wmdp", {}, lambda evaluation, retrained: {}, utility="mmlu", forgetting="wmdp_bio", benchmarks=benchmarks
    )
