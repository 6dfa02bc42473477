"""Pairs of a forget row and the retain rows that accompany it, and their collation into one batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset
from trl.trainer.utils import pad

from hf_unlearn.data.alternates import AlternateAnswers


FILLER = -1  # number of a row that fills a batch


class PairedDataset(Dataset):
    """
    Every forget row once an epoch, each with retain rows of its own.

    Retain rows are drawn without replacement along one endless stream of seeded shuffles of the retain set: row `i` of
    epoch `e` takes positions `(e·F + i)·k … + k − 1`, `F` being the number of forget rows. So all retain rows are
    visited equally often, a retain set smaller than the forget set wraps, processes that are dealt different forget
    rows see different retain rows, and a resumed run draws what the uninterrupted one would have drawn.

    An index beyond the forget rows gives a pair without labels, which fills a batch and counts for nothing.

    Args:
        forget (`datasets.Dataset`): Tokenised forget set with `input_ids` and `labels`.
        retain (`datasets.Dataset`): Tokenised retain set with `input_ids` and `labels`.
        retain_per_forget (`int`, *optional*, defaults to `1`): Retain rows that accompany a forget row, `k` above.
        seed (`int`, *optional*, defaults to `0`): Seed of the shuffles.
        alternates ([`AlternateAnswers`], *optional*): Other answers to the prompts of the forget set.
        instead (`bool`, *optional*, defaults to `False`): Whether they take the place of the forget rows, instead of
            going beside them.
    """

    def __init__(
        self,
        forget: datasets.Dataset,
        retain: datasets.Dataset,
        retain_per_forget: int = 1,
        seed: int = 0,
        alternates: AlternateAnswers | None = None,
        instead: bool = False,
    ) -> None:
        self.forget = forget
        self.retain = retain
        self.retain_per_forget = retain_per_forget
        self.seed = seed
        self.alternates = alternates
        self.instead = instead
        self.epoch = 0
        self._shuffles: dict[int, list[int]] = {}

    def set_epoch(self, epoch: int) -> None:
        """Move to another epoch: the retain rows that accompany each forget row change."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> dict[str, Any]:
        keep = ("input_ids", "labels")
        if index >= len(self):
            tokens = self.forget[0]["input_ids"][:2]
            filler = {"number": FILLER, "input_ids": tokens, "labels": [-100] * len(tokens)}
            return self._with_alternate({"forget": filler, "retain": [filler] * self.retain_per_forget}, filler)
        forget = self.forget[index]
        start = (self.epoch * len(self) + index) * self.retain_per_forget
        numbers = [self._retain_index(start + k) for k in range(self.retain_per_forget)]
        retain = [self.retain[number] for number in numbers]
        pair = {
            "forget": {"number": index} | {key: forget[key] for key in keep},
            "retain": [
                {"number": number} | {key: row[key] for key in keep}
                for number, row in zip(numbers, retain, strict=True)
            ],
        }
        if self.alternates is None:
            return pair
        return self._with_alternate(pair, {"number": index} | self.alternates.draw(index, self.epoch))

    def _with_alternate(self, pair: dict[str, Any], alternate: dict[str, Any]) -> dict[str, Any]:
        return pair if self.alternates is None else pair | {"forget" if self.instead else "alternate": alternate}

    def retain_rows_met(self, num_epochs: int) -> list[int]:
        """The retain rows that the first epochs meet, each once."""
        met = num_epochs * len(self) * self.retain_per_forget
        if met >= len(self.retain):
            return list(range(len(self.retain)))
        return sorted(self._retain_index(position) for position in range(met))

    def _retain_index(self, position: int) -> int:
        """Index of the retain row at a position of the endless stream."""
        lap, offset = divmod(position, len(self.retain))
        if lap not in self._shuffles:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + lap)
            self._shuffles[lap] = torch.randperm(len(self.retain), generator=generator).tolist()
            self._shuffles.pop(lap - 2, None)
        return self._shuffles[lap][offset]


@dataclass
class PairCollator:
    """
    Collates pairs into one right-padded batch: the forget rows first, then their alternate rows if there are any, then
    the retain rows. Rows that are no pairs (an evaluation set) are collated as they are.

    Args:
        pad_token_id (`int`): Token id of the padding.
        pad_to_multiple_of (`int`, *optional*): Pad the length to a multiple of this.

    Returns:
        `dict` with `input_ids`, `attention_mask`, `labels` of shape `(F + R, T)`, labels being −100 on prompt and
        padding, and for pairs `is_forget`, `is_alternate` (bool) and `rows` (each row's number in its set), of shape
        `(F + R,)`; or `F + F + R` rows with alternate ones.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "forget" not in examples[0]:
            return self._collate(examples)
        forget = [pair["forget"] for pair in examples]
        retain = [row for pair in examples for row in pair["retain"]]
        alternate = [pair["alternate"] for pair in examples if "alternate" in pair]
        rows = forget + alternate + retain
        batch = self._collate(rows)
        number = torch.arange(len(rows))
        batch["is_forget"] = number < len(forget)
        batch["is_alternate"] = ~batch["is_forget"] & (number < len(forget) + len(alternate))
        batch["rows"] = torch.tensor([row["number"] for row in rows])
        return batch

    def _collate(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def padded(values: list[list[int]], padding_value: int) -> torch.Tensor:
            tensors = [torch.tensor(value) for value in values]
            return pad(tensors, padding_value=padding_value, pad_to_multiple_of=self.pad_to_multiple_of)

        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": padded([row["labels"] for row in rows], -100),
        }
