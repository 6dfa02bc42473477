"""A launch that came down to something else is refused, and batches of several processes repeat no row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from hf_unlearn.cli import main
from hf_unlearn.data.pairing import FILLER, PairCollator, PairedDataset
from hf_unlearn.errors import UnlearningError
from hf_unlearn.trainer.processes import EvenSampler, check_launch


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP1 = {"ACCELERATE_USE_FSDP": "true"}
FSDP2 = FSDP1 | {"FSDP_VERSION": "2"}
TWO = {"WORLD_SIZE": "2"}


def arguments(kind: DistributedType, processes: int) -> SimpleNamespace:
    return SimpleNamespace(distributed_state=SimpleNamespace(distributed_type=kind, num_processes=processes))


@pytest.fixture
def launched(monkeypatch):
    """Set the environment of a launch."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_a_command_leaves_the_group_whatever_its_end(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    assert main(["extrapolate"]) == 2
    assert not torch.distributed.is_initialized()


class TestCheckLaunch:
    @pytest.mark.parametrize(
        ("variables", "kind", "processes", "message"),
        [
            (DEEPSPEED | TWO, DistributedType.MULTI_CPU, 2, "asks for DeepSpeed, but the processes run as MULTI_CPU"),
            (DEEPSPEED, DistributedType.NO, 1, "asks for DeepSpeed"),
            (FSDP2 | TWO, DistributedType.MULTI_CPU, 2, "asks for FSDP"),
            (FSDP2 | TWO, DistributedType.NO, 2, "asks for FSDP"),
            (FSDP1 | TWO, DistributedType.MULTI_GPU, 2, "fsdp_version: 2"),
            (TWO, DistributedType.NO, 2, "do not work together"),
            (TWO, DistributedType.NO, 1, "do not work together"),
        ],
    )
    def test_refused(self, launched, variables, kind, processes, message):
        launched(variables)
        with pytest.raises(UnlearningError, match=message):
            check_launch(arguments(kind, processes))

    @pytest.mark.parametrize(
        ("variables", "kind", "processes"),
        [
            ({}, DistributedType.NO, 1),
            ({"WORLD_SIZE": "1"}, DistributedType.NO, 1),
            (TWO, DistributedType.MULTI_CPU, 2),
            (TWO, DistributedType.MULTI_GPU, 2),
            (DEEPSPEED | TWO, DistributedType.DEEPSPEED, 2),
            (FSDP2 | TWO, DistributedType.MULTI_GPU, 2),
        ],
    )
    def test_accepted(self, launched, variables, kind, processes):
        launched(variables)
        check_launch(arguments(kind, processes))


def paired(rows: int) -> PairedDataset:
    tokenized = Dataset.from_list(
        [{"input_ids": [7, 8, 9, row], "labels": [-100, -100, 9, row]} for row in range(rows)]
    )
    return PairedDataset(tokenized, tokenized, retain_per_forget=2)


def dealt(sampler: EvenSampler, processes: int, batch_size: int) -> list[list[list[int]]]:
    """The batches of each process, as accelerate deals them."""
    return [
        list(BatchSamplerShard(BatchSampler(sampler, batch_size, drop_last=False), processes, rank))
        for rank in range(processes)
    ]


class TestEvenSampler:
    @pytest.mark.parametrize(("rows", "processes", "batch_size"), [(15, 2, 2), (1, 2, 1), (9, 4, 3), (8, 2, 2)])
    def test_every_row_once_and_every_batch_full(self, rows, processes, batch_size):
        dataset = paired(rows)
        sampler = EvenSampler(RandomSampler(dataset), dataset, 3, processes * batch_size)
        batches = dealt(sampler, processes, batch_size)
        assert len({len(of_process) for of_process in batches}) == 1
        assert {len(batch) for of_process in batches for batch in of_process} == {batch_size}
        indices = sorted(index for of_process in batches for batch in of_process for index in batch)
        assert indices == list(range(len(sampler)))  # each forget row once, then indices beyond the last
        assert len(sampler) - rows < processes * batch_size

    def test_its_order_is_that_of_one_process_in_every_epoch(self):
        dataset = paired(15)
        sampler = EvenSampler(RandomSampler(dataset), dataset, 3, 4)
        one = SeedableRandomSampler(dataset, data_seed=3)
        orders = []
        for epoch in (0, 1, 4):  # a resumed run starts in a later epoch
            dataset.set_epoch(epoch)
            one.set_epoch(epoch)
            orders.append(list(sampler))
            assert orders[-1] == [*one, 15]
        assert orders[0] != orders[1] != orders[2]

    def test_a_sampler_that_is_not_random_stays(self):
        dataset = paired(3)
        assert list(EvenSampler(SequentialSampler(dataset), dataset, None, 4)) == [0, 1, 2, 3]


def test_a_filler_has_no_labels_and_no_number():
    dataset = paired(3)
    batch = PairCollator(pad_token_id=0)([dataset[2], dataset[3]])
    assert batch["is_forget"].tolist() == [True, True, False, False, False, False]
    assert batch["labels"][0].tolist() == [-100, -100, 9, 2]
    for row in (1, 4, 5):
        assert (batch["labels"][row] == -100).all()
        assert batch["rows"][row] == FILLER
    assert not (batch["rows"][[0, 2, 3]] == FILLER).any()
