"""WMDP (arXiv 2403.03218): hazardous knowledge, as multiple choice, with MMLU as what must stay."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hf_unlearn.evaluation.protocols.base import Protocol
from hf_unlearn.evaluation.protocols.harness import run_harness


def wmdp_protocol(limit: int | None = None, include_path: str | Path | None = None) -> Protocol:
    """
    Accuracy on the three parts of WMDP and on MMLU, which is the utility, by lm-evaluation-harness.

    Args:
        limit (`int`, *optional*): Questions per task; all if not given.
        include_path (`str` or `Path`, *optional*): Folder with task definitions over local files.
    """
    benchmarks = partial(run_harness, limit=limit, batch_size=16, include_path=include_path)
    return Protocol("wmdp", {}, lambda evaluation, retrained: {}, utility="mmlu", benchmarks=benchmarks)
