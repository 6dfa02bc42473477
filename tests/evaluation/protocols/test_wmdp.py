"""What the WMDP protocol hands to lm-evaluation-harness."""

from __future__ import annotations

import pytest

from hf_unlearn import UnlearningError
from hf_unlearn.evaluation.protocols import harness, wmdp_protocol


def test_options_reach_the_harness():
    options = {"limit": 5, "include_path": "tasks", "batch_size": 3}
    benchmarks = wmdp_protocol(**options).benchmarks
    assert benchmarks.func is harness.run_harness
    assert benchmarks.keywords == options


def test_utility_is_a_task():
    protocol = wmdp_protocol()
    assert protocol.utility in harness.TASKS
    assert (protocol.name, protocol.sets) == ("wmdp", {})


def test_a_limit_that_leaves_no_questions():
    with pytest.raises(UnlearningError, match="limit=0 leaves no rows"):
        wmdp_protocol(limit=0)
