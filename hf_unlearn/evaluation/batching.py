"""Running many rows of unlike length in few batches, on one process or several."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub.utils import tqdm

from hf_unlearn.errors import UnlearningError


T = TypeVar("T")
BatchSize = int | Literal["auto"]


def parse_batch_size(value: str | int, option: str) -> BatchSize:
    """The batch size written in an option; refuse what is neither `"auto"` nor a number above 0."""
    if value == "auto":
        return "auto"
    if not (str(value).isdigit() and int(value)):
        raise UnlearningError(f"{option} {value} is neither `auto` nor a number above 0.")
    return int(value)


def process_state() -> PartialState:
    """Which process of how many this is. Without an accelerator, accelerate sees others only where it is told `cpu`."""
    return PartialState(cpu=not torch.accelerator.is_available())


def run_in_batches(
    costs: Sequence[int],
    run: Callable[[list[int]], list[T]],
    *,
    batch_size: BatchSize,
    max_tokens: int,
    kinds: Sequence[int] | None = None,
    lockstep: AbstractContextManager | None = None,
    progress: str | None = None,
    on_results: Callable[[list[int], list[T]], None] | None = None,
) -> list[T]:
    """
    Call `run` on batches of rows of like cost, and return the results in the order of the rows.

    With several processes, each takes every n-th batch, all take the same number of them (the last ones are run twice
    where that does not divide), and all get all results. A batch that does not fit the memory is halved, and those
    after it too.

    Args:
        costs (sequence of `int`):
            Tokens of each row.
        run (`Callable`):
            Gets indices of rows, by falling cost, and returns the result of each.
        batch_size (`int` or `"auto"`):
            Rows in a batch; `"auto"` fills batches up to `max_tokens` padded tokens, and gives every process some.
        max_tokens (`int`):
            Padded tokens in a batch under `"auto"`. A row that has more makes a batch of its own.
        kinds (sequence of `int`, *optional*):
            Rows of different kinds never share a batch.
        lockstep ([`~hf_unlearn.evaluation.lockstep.Lockstep`], *optional*):
            What keeps the processes in step while they run batches on sharded weights. No batch is halved then: a pass
            that fails in one process cannot be taken back in the others.
        progress (`str`, *optional*):
            Label of a progress bar over the rows; none is shown if not given.
        on_results (`Callable`, *optional*):
            Gets the indices and results of each batch that this process ran, as soon as it is done.
    """
    state = process_state()
    kinds = kinds or [0] * len(costs)
    most = -(-len(costs) // state.num_processes) if batch_size == "auto" else batch_size
    batches = _make_batches(costs, kinds, most, max_tokens if batch_size == "auto" else None)
    rounds = -(-len(batches) // state.num_processes)
    largest = max((len(batch) for batch in batches), default=0)
    results: dict[int, T] = {}
    hidden = progress is None or not state.is_main_process
    with lockstep or nullcontext(), tqdm(total=len(costs), desc=progress, disable=hidden, leave=False) as bar:
        for number in range(rounds):
            of_all = batches[number * state.num_processes : (number + 1) * state.num_processes]
            batch = of_all[min(state.process_index, len(of_all) - 1)]
            done, largest = _run_in_parts(batch, run, largest, halve=lockstep is None)
            results |= done
            if on_results is not None and state.process_index < len(of_all):
                on_results(list(done), list(done.values()))
            bar.update(sum(map(len, of_all)))
    if state.num_processes > 1:
        results = dict(gather_object(list(results.items())))
    return [results[index] for index in range(len(costs))]


def _make_batches(costs: Sequence[int], kinds: Sequence[int], most: int, max_tokens: int | None) -> list[list[int]]:
    """Batches of up to `most` rows of one kind, by falling cost, and of up to `max_tokens` padded tokens."""
    order = sorted(range(len(costs)), key=lambda index: (kinds[index], -costs[index]))
    batches: list[list[int]] = []
    for index in order:
        batch = batches[-1] if batches else []
        fits = max_tokens is None or not batch or (len(batch) + 1) * costs[batch[0]] <= max_tokens
        if batch and len(batch) < most and fits and kinds[batch[0]] == kinds[index]:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def _run_in_parts(
    batch: list[int], run: Callable[[list[int]], list[T]], largest: int, halve: bool
) -> tuple[dict[int, T], int]:
    """Results by row of a batch in parts of up to `largest` rows, and the size to go on with."""
    done: dict[int, T] = {}
    while len(done) < len(batch):
        part = batch[len(done) :][:largest]
        try:
            done |= zip(part, run(part), strict=True)
        except RuntimeError as error:
            if len(part) == 1 or not should_reduce_batch_size(error):
                raise
            if not halve:
                raise UnlearningError(
                    f"A batch of {len(part)} rows does not fit the memory, and cannot be halved while weights are "
                    "sharded (ZeRO-3, FSDP2). Set a smaller `batch_size` of the evaluation."
                ) from error
            largest = len(part) // 2
            warnings.warn(
                f"A batch of {len(part)} rows does not fit the memory; going on with {largest}.", stacklevel=2
            )
    return done, largest
