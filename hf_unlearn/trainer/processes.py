"""What training in several processes needs besides accelerate: a checked launch, and batches that repeat no row."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator

import torch.distributed
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import DistributedType
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainingArguments

from hf_unlearn.data.pairing import PairedDataset
from hf_unlearn.errors import UnlearningError


def check_launch(args: TrainingArguments) -> None:
    """Raise where a launch has come down to something else than its configuration asks for, which no library says."""
    state = args.distributed_state
    on_cpu = "Remove `use_cpu` (in the trainer's options and in the launch configuration)"
    if _is_on("ACCELERATE_USE_DEEPSPEED") and state.distributed_type != DistributedType.DEEPSPEED:
        raise UnlearningError(
            f"The launch configuration asks for DeepSpeed, but the processes run as {state.distributed_type.value}: "
            f"nothing would be sharded. {on_cpu}."
        )
    if _is_on("ACCELERATE_USE_FSDP"):
        if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
            raise UnlearningError(
                "The launch configuration asks for FSDP, which accelerate has on accelerators only: nothing would be "
                f"sharded. {on_cpu}, or train with DDP."
            )
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UnlearningError(
                "FSDP 1 flattens the weights, and what is read of them here would be wrong. Set `fsdp_version: 2` in "
                "the launch configuration (recipes/accelerate/fsdp2.yaml)."
            )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and (state.num_processes == 1 or state.distributed_type == DistributedType.NO):
        raise UnlearningError(
            f"{launched} processes were launched, but they do not work together: each would train alone. On CPU set "
            "`use_cpu` and `ddp_backend='gloo'`, or launch one process; on accelerators remove `ddp_backend`."
        )


def leave_processes() -> None:
    """
    Leave the group of processes: the last thing that a program does which is launched in several. Otherwise gloo's
    threads may still want the interpreter when it ends, and the process is aborted (SIGABRT) after all its work is done.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # what uses the group keeps its threads
        torch.distributed.destroy_process_group()
        time.sleep(0.2)  # for threads that let go of their last piece of work


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


class EvenSampler(Sampler[int]):
    """
    The indices of another sampler, then as many beyond the data set as make the batches of all processes full.

    accelerate fills the last batches with rows of the epoch's start, which would then count twice. The indices beyond
    the end stand for rows that count for nothing, see [`PairedDataset`].

    Args:
        sampler (`Sampler`): The sampler of one process.
        dataset ([`PairedDataset`]): The rows. Its epoch is the sampler's as well: accelerate does not pass it on to the
            sampler of several processes that are resumed within an epoch.
        seed (`int` or `None`): `data_seed` of the training arguments.
        multiple (`int`): Rows in one batch of all processes.
    """

    def __init__(self, sampler: Sampler[int], dataset: PairedDataset, seed: int | None, multiple: int) -> None:
        if isinstance(sampler, RandomSampler):  # what accelerate makes of it in one process
            sampler = SeedableRandomSampler(dataset, data_seed=seed)
        self.sampler = sampler
        self.dataset = dataset
        self.length = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.sampler, SeedableRandomSampler):
            self.sampler.set_epoch(self.dataset.epoch)
        yield from self.sampler
        yield from range(len(self.dataset), self.length)
