"""Sign consensus of several adapters: a dense update, computed a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter
from hf_unlearn.extrapolation.arithmetic import TensorError, row_pieces
from hf_unlearn.extrapolation.checkpoint import SafetensorsFile
from hf_unlearn.extrapolation.low_rank import Factors, check_combinable, combined_provenance, operator_record


class SignConsensus(LoraAdapter):
    """
    Entries of the update whose sign is the same in all adapters, averaged; the others are zero (NegMerge,
    arXiv 2410.05583).

    Selecting entries raises the rank, so there are no factors: [`extrapolate`] merges it in pieces like an adapter, and
    [`truncate`] approximates it by one. A module that one of the adapters leaves alone has no consensus, and stays as
    it is.

    Args:
        adapters (list of [`LoraAdapter`], `str` or `Path`): At least two memorising adapters of one base, trained on
            the same rows with other seeds or hyper-parameters.
    """

    def __init__(self, adapters: Sequence[LoraAdapter | str | Path]) -> None:
        self.sources = [a if isinstance(a, LoraAdapter) else LoraAdapter.load(a) for a in adapters]
        if len(self.sources) < 2:
            raise UnlearningError("A sign consensus needs two adapters or more. Train with another seed.")
        check_combinable(self.sources)
        first = self.sources[0]
        self.modules = {
            module: pair
            for module, pair in first.modules.items()
            if all(module in source.modules for source in self.sources)
        }
        if not self.modules:
            raise UnlearningError("The adapters have no module in common, so nothing is agreed on.")
        self.id = f"the sign consensus of {', '.join(source.id for source in self.sources)}"
        self.sha256 = None  # of no file; those of the sources are in the operator's record
        self.folder = first.folder
        self.config = first.config
        self.operator = operator_record("consensus", self.sources)
        self.provenance = combined_provenance(first, self.operator)

    @property
    def file(self) -> SafetensorsFile:
        raise UnlearningError(
            f"{self.id} has no factors, so it cannot be written as an adapter as it is. Write the forget model with "
            "`extrapolate`, or approximate it with `truncate` (--rank)."
        )

    def delta(self, module: str) -> torch.Tensor:
        """The update of `module` in fp32, in the orientation of the base weight."""
        return self.delta_rows(module, 0, self.modules[module].delta_shape[0])

    def delta_rows(self, module: str, first: int, last: int) -> torch.Tensor:
        """
        Rows of [`~SignConsensus.delta`].

        Args:
            module (`str`): Name of the module.
            first (`int`): First row, in the orientation of the base weight.
            last (`int`): Last row, exclusive.
        """
        total = self.sources[0].delta_rows(module, first, last)
        sign = total.sign()
        agreed = sign != 0
        for source in self.sources[1:]:
            delta = source.delta_rows(module, first, last)
            agreed &= delta.sign() == sign
            total = total + delta
        return (total / len(self.sources)).masked_fill_(~agreed, 0)

    def measure(self) -> tuple[float, float]:
        """Frobenius norm of the update, and the share of entries that all adapters agree on; one pass over it."""
        squares, agreed, entries = 0.0, 0, 0
        for module, pair in tqdm(self.modules.items(), desc="Sign consensus", leave=False):
            rows, columns = pair.delta_shape
            entries += rows * columns
            for first, last in row_pieces(rows, columns):
                delta = self.delta_rows(module, first, last)
                squares += torch.linalg.vector_norm(delta, dtype=torch.float64).item() ** 2
                agreed += int(delta.count_nonzero())
        return squares**0.5, agreed / entries

    def best_factors(self, module: str, rank: int) -> tuple[Factors, TensorError]:
        """The best approximation of up to `rank`: the projection on the leading singular vectors of the shorter side."""
        fan_in_fan_out = self.config.fan_in_fan_out
        delta = self.delta(module).double()
        delta = delta.T if fan_in_fan_out else delta
        wide = delta.shape[0] <= delta.shape[1]
        values, vectors = torch.linalg.eigh(delta @ delta.T if wide else delta.T @ delta)
        values, vectors = values.clamp(min=0)[-rank:], vectors[:, -rank:]
        a, b = (vectors.T @ delta, vectors) if wide else (vectors.T, delta @ vectors)
        squared_norm = delta.square().sum().item()
        error = TensorError(max(0.0, squared_norm - values.sum().item()), squared_norm, changed=True)
        return Factors(a, b, fan_in_fan_out), error
