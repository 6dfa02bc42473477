"""Which rows share a batch, and what happens to a batch that does not fit."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import run_in_batches


COSTS = [3, 10, 1, 7, 7, 2, 40, 5]


def record(batches: list[list[int]]):
    def run(indices: list[int]) -> list[str]:
        batches.append(indices)
        return [f"row {index}" for index in indices]

    return run


def results_of(costs) -> list[str]:
    return [f"row {index}" for index in range(len(costs))]


@pytest.mark.parametrize("batch_size", [1, 3, 100, "auto"])
def test_results_come_in_the_order_of_the_rows(batch_size):
    assert run_in_batches(COSTS, record([]), batch_size=batch_size, max_tokens=20) == results_of(COSTS)


def test_no_rows():
    assert run_in_batches([], record([]), batch_size="auto", max_tokens=20) == []


def test_batches_of_given_size_run_by_falling_cost():
    batches = []
    run_in_batches(COSTS, record(batches), batch_size=3, max_tokens=1)
    assert batches == [[6, 1, 3], [4, 7, 0], [5, 2]]


def test_automatic_batches_hold_as_many_padded_tokens_as_allowed():
    batches = []
    run_in_batches(COSTS, record(batches), batch_size="auto", max_tokens=20)
    # 40 alone; 2 × 10; 2 × 7 leaves no room for a third row of 7; 3 rows of up to 3
    assert batches == [[6], [1, 3], [4, 7], [0, 5, 2]]


def test_kinds_never_mix():
    batches, kinds = [], [1, 2, 1, 2, 1, 2, 2, 1]
    results = run_in_batches(COSTS, record(batches), batch_size="auto", max_tokens=1000, kinds=kinds)
    assert results == results_of(COSTS)
    assert batches == [[4, 7, 0, 2], [6, 1, 3, 5]]


class TestMemory:
    ERRORS = [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    ]

    def run(self, fits, error=ERRORS[0]):
        """A run that fails where `fits` says so, and the batches that it completed."""
        done = []

        def run(indices: list[int]) -> list[str]:
            if not fits(indices):
                raise error
            return record(done)(indices)

        return run, done

    @pytest.mark.parametrize("error", ERRORS, ids=["cuda", "hip", "cpu"])
    def test_a_batch_that_does_not_fit_is_halved_and_those_after_it_too(self, error):
        run, done = self.run(lambda indices: len(indices) <= 3, error)
        with pytest.warns(UserWarning) as caught:
            results = run_in_batches([1] * 40, run, batch_size=16, max_tokens=1)
        assert results == results_of([1] * 40)
        assert {len(batch) for batch in done} == {2}
        assert [str(warning.message) for warning in caught] == [
            f"A batch of {size} rows does not fit the memory; going on with {size // 2}." for size in (16, 8, 4)
        ]

    def test_the_limit_may_shrink_in_the_middle_of_a_batch(self):
        """The second kind is costlier: 4 rows of the first fit, but only 2 of the second."""
        kinds = [0] * 8 + [1] * 8
        run, done = self.run(lambda indices: len(indices) <= (2 if kinds[indices[0]] else 4))
        seen = []
        with pytest.warns(UserWarning, match="does not fit"):
            results = run_in_batches(
                [1] * 16, run, batch_size=8, max_tokens=1, kinds=kinds, on_results=lambda *pair: seen.append(pair)
            )
        assert results == results_of(kinds)
        assert sorted(index for indices in done for index in indices) == list(range(16))
        assert sorted(index for indices, _ in seen for index in indices) == list(range(16))

    def test_a_row_that_does_not_fit_alone_is_an_error(self):
        run, _ = self.run(lambda indices: 5 not in indices)
        with warnings.catch_warnings(), pytest.raises(torch.cuda.OutOfMemoryError):
            warnings.simplefilter("ignore")
            run_in_batches([1] * 8, run, batch_size=8, max_tokens=1)

    def test_a_batch_that_runs_on_sharded_weights_is_not_halved(self):
        """The other processes wait for a pass of this one; it could not be taken back in them."""
        run, done = self.run(lambda indices: len(indices) <= 3)
        with pytest.raises(UnlearningError, match="A batch of 8 rows .*`batch_size`"):
            run_in_batches([1] * 8, run, batch_size=8, max_tokens=1, lockstep=nullcontext())
        assert not done

    def test_other_errors_are_not_swallowed(self):
        tried = []
        run, _ = self.run(tried.append, RuntimeError("expected Float but found Half"))
        with pytest.raises(RuntimeError, match="found Half"):
            run_in_batches([1] * 8, run, batch_size=8, max_tokens=1)
        assert tried == [list(range(8))]  # not halved


def test_each_batch_is_handed_on_as_soon_as_it_is_done():
    events = []

    def run(indices):
        events.append(("run", indices))
        return results_of(COSTS)[: len(indices)]

    run_in_batches(
        [4, 3, 2, 1],
        run,
        batch_size=2,
        max_tokens=1,
        on_results=lambda indices, results: events.append(("done", indices, results)),
    )
    assert events == [
        ("run", [0, 1]),
        ("done", [0, 1], ["row 0", "row 1"]),
        ("run", [2, 3]),
        ("done", [2, 3], ["row 0", "row 1"]),
    ]
