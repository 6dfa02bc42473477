"""
What the reference model says of each row, computed once and read in every epoch.

The reference never changes, so its hidden states at the scored positions of a row are the same in every epoch. They are
kept in a memory-mapped file of the run's output folder, one row once, that the processes of a machine share. The file
has no name any more once all of them have opened it, so that nothing is left behind however the run ends.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from huggingface_hub.utils import tqdm

from hf_unlearn.data.pairing import FILLER, PairCollator, PairedDataset
from hf_unlearn.errors import UnlearningError
from hf_unlearn.trainer.batch import MicroBatch, Reference


LEAST_REUSE = 2  # times that each row is met
LARGEST_SHARE_OF_DISK = 0.1  # of the free space, where the cache was not asked for


@dataclass(frozen=True)
class CachePlan:
    """
    What the reference cache takes and saves.

    Args:
        rows (`dict`): Name of a set, `"forget"` or `"retain"` -> its rows that a run meets.
        passes (`float`): Passes of the reference over a row that the run makes without the cache.
        num_bytes (`int`): Most that the files take, in bytes: fp32; half of it where the model runs in 16 bits.
        machines (`int`, *optional*, defaults to `1`): Machines, each of which computes all rows for itself.
    """

    rows: dict[str, list[int]]
    passes: float
    num_bytes: int
    machines: int = 1

    @property
    def num_rows(self) -> int:
        """Rows of all sets."""
        return sum(map(len, self.rows.values()))

    def pays(self, free_bytes: int) -> bool:
        """Whether a pass over a row saves at least one other, and the files take at most a tenth of the free disk."""
        saves = self.passes >= LEAST_REUSE * self.num_rows * self.machines > 0
        return saves and self.num_bytes <= LARGEST_SHARE_OF_DISK * free_bytes


def plan_cache(
    pairs: PairedDataset,
    sets: Iterable[str],
    epochs: float,
    hidden_size: int,
    machines: int = 1,
    forget_width: int = 1,
) -> CachePlan:
    """
    Count what a run meets.

    Args:
        pairs ([`PairedDataset`]): The rows of the run.
        sets (iterable of `str`): The sets on which the method asks the reference.
        epochs (`float`): Passes over the forget set.
        hidden_size (`int`): Hidden size of the model.
        machines (`int`, *optional*, defaults to `1`): Machines.
        forget_width (`int`, *optional*, defaults to `1`): Numbers that are kept of each token of the forget set.
    """
    rows, passes, num_bytes = {}, 0.0, 0
    for name in sets:
        is_retain = name == "retain"
        dataset = pairs.retain if is_retain else pairs.forget
        rows[name] = pairs.retain_rows_met(math.ceil(epochs)) if is_retain else list(range(len(dataset)))
        passes += epochs * len(pairs) * (pairs.retain_per_forget if is_retain else 1)
        labels = dataset["labels"]
        vectors = sum(num_scored(labels[row]) for row in rows[name])
        num_bytes += vectors * (hidden_size if is_retain else forget_width) * torch.float32.itemsize
    return CachePlan(rows, passes, num_bytes, machines)


def num_scored(labels: list[int]) -> int:
    """Scored positions of a tokenised row: position 0 is never one."""
    return sum(label != -100 for label in labels[1:])


def free_disk(folder: str | Path) -> int:
    """Free bytes where `folder` is or will be."""
    path = Path(folder).expanduser().resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class RowFile:
    """
    Vectors of rows in a memory-mapped file.

    Args:
        path (`Path`): The file; made by [`RowFile.reserve`].
        lengths (`dict`): Row -> number of its vectors.
        width (`int`): Length of a vector.
        dtype (`torch.dtype`): Its dtype.
    """

    def __init__(self, path: Path, lengths: dict[int, int], width: int, dtype: torch.dtype) -> None:
        ends = torch.tensor(list(lengths.values())).cumsum(0).tolist()
        self._places = {row: slice(end - lengths[row], end) for row, end in zip(lengths, ends, strict=True)}
        self._places[FILLER] = slice(0, 0)
        size = ends[-1] * width
        self._vectors = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(-1, width)

    @staticmethod
    def reserve(path: Path, num_bytes: int) -> None:
        """Make a file of `num_bytes`, so that a full disk is met here and not while memory is written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:
                file.truncate(num_bytes)

    def write(self, rows: list[int], vectors: torch.Tensor) -> None:
        """Store the vectors of `rows`, one row after the other."""
        start = 0
        for row in rows:
            place = self._places[row]
            stop = start + place.stop - place.start
            self._vectors[place] = vectors[start:stop].cpu()
            start = stop

    def read(self, rows: list[int]) -> torch.Tensor:
        """The vectors of `rows`, one row after the other, shape `(N, width)`."""
        return torch.cat([self._vectors[self._places[row]] for row in rows])


class ReferenceCache:
    """
    The reference's outputs on rows that were computed before, see [`fill_cache`].

    Args:
        files (`dict`): Name of a set, `"forget"` or `"retain"` -> its [`RowFile`].
    """

    def __init__(self, files: dict[str, RowFile]) -> None:
        self._files = files

    def of(self, batch: MicroBatch) -> Reference:
        """What the reference says of a micro-batch."""
        outputs: dict[str, torch.Tensor | None] = {"forget": None, "retain": None}
        for name, file in self._files.items():
            of_set = batch.is_forget if name == "forget" else ~(batch.is_forget | batch.is_alternate)
            rows = batch.rows[of_set].tolist()
            outputs[name] = file.read(rows).to(batch.labels.device, non_blocking=True)
        return Reference(outputs["retain"], outputs["forget"])


@dataclass(frozen=True)
class _Filler:
    """Computes what the reference says of the rows of a plan; see [`fill_cache`]."""

    reference_pass: Callable[[MicroBatch], Reference]
    collator: PairCollator
    accelerator: Accelerator
    folder: Path
    batch_size: int
    progress: bool

    def fill(self, name: str, dataset: datasets.Dataset, rows: list[int], size: str) -> RowFile:
        """Compute the rows of one set; the processes of a machine share them."""
        labels = dataset["labels"]
        lengths = {row: num_scored(labels[row]) for row in rows}
        by_length = sorted(rows, key=lambda row: (len(labels[row]), row))
        batches = [by_length[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        processes, index = num_local_processes(self.accelerator), self.accelerator.local_process_index
        label = f"Caching the reference of {len(rows):,} {name} rows ({size})"
        hidden = not (self.progress and self.accelerator.is_main_process)
        file = None
        for start in tqdm(range(0, len(batches), processes), desc=label, disable=hidden):
            batch = batches[min(start + index, len(batches) - 1)]
            vectors = self._run(name, dataset, batch)
            if file is None:
                file = self._make_file(name, lengths, vectors)
            file.write(batch, vectors)
        self.accelerator.wait_for_everyone()
        return file

    def _run(self, name: str, dataset: datasets.Dataset, rows: list[int]) -> torch.Tensor:
        """What the reference says of some rows, one vector for each scored position."""
        inputs = self.collator([{key: dataset[row][key] for key in ("input_ids", "labels")} for row in rows])
        inputs |= {"is_forget": torch.full((len(rows),), name == "forget"), "rows": torch.tensor(rows)}
        batch = MicroBatch({key: value.to(self.accelerator.device) for key, value in inputs.items()})
        reference = self.reference_pass(batch)
        return reference.retain_hidden if name == "retain" else reference.forget

    def _make_file(self, name: str, lengths: dict[int, int], vectors: torch.Tensor) -> RowFile:
        path = self.folder / f".reference-cache-{name}-{platform.node()}"
        width, dtype = vectors.shape[1], vectors.dtype
        num_bytes = sum(lengths.values()) * width * dtype.itemsize
        self._check_disk(num_bytes)
        if self.accelerator.is_local_main_process:
            RowFile.reserve(path, num_bytes)
        self.accelerator.wait_for_everyone()
        file = RowFile(path, lengths, width, dtype)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            with suppress(PermissionError):  # Windows keeps the name of an open file
                path.unlink()
        return file

    def _check_disk(self, num_bytes: int) -> None:
        free = free_disk(self.folder)
        if num_bytes > free:
            raise UnlearningError(
                f"`reference_cache` needs {num_bytes:,} bytes in {self.folder}, which has {free:,} free. Make room, "
                "name another `output_dir`, or set reference_cache=False."
            )


def fill_cache(
    plan: CachePlan,
    pairs: PairedDataset,
    reference_pass: Callable[[MicroBatch], Reference],
    collator: PairCollator,
    accelerator: Accelerator,
    folder: str | Path,
    batch_size: int,
    progress: bool = True,
) -> ReferenceCache:
    """
    Compute what the reference says of the rows that a run will meet.

    Args:
        plan ([`CachePlan`]): Which rows.
        pairs ([`PairedDataset`]): The rows.
        reference_pass (`Callable`): Runs the reference over a [`MicroBatch`] of rows of one set. Every process calls it
            equally often.
        collator ([`PairCollator`]): Collates rows.
        accelerator (`Accelerator`): Processes of the run.
        folder (`str` or `Path`): Where the files go.
        batch_size (`int`): Rows in a pass.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar, which says the size.
    """
    filler = _Filler(reference_pass, collator, accelerator, Path(folder), batch_size, progress)
    size = f"at most {plan.num_bytes / 1e6:,.1f} MB"
    sets = {"forget": pairs.forget, "retain": pairs.retain}
    return ReferenceCache({name: filler.fill(name, sets[name], rows, size) for name, rows in plan.rows.items()})


def num_local_processes(accelerator: Accelerator) -> int:
    """Processes of the run on this machine."""
    return min(accelerator.num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
