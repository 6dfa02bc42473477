"""Sums of LoRA products: one update a module, computed from the factors alone and written as an ordinary adapter."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft import LoraConfig

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import (
    ADAPTER_WEIGHTS_FILE,
    LoraAdapter,
    LoraPair,
    refuse_overwriting,
)
from hf_unlearn.extrapolation.arithmetic import RealisedError, TensorError
from hf_unlearn.extrapolation.checkpoint import atomic_folder, write_shard
from hf_unlearn.extrapolation.provenance import package_versions, secret_note, write_provenance


logger = logging.getLogger(__name__)

FP32_BYTES = 4
CANCELLED = 1e-6  # a sum this small against its terms is rounding


@dataclass(frozen=True)
class Factors:
    """
    The factors of one module in memory, in the form of a [`LoraPair`].

    Args:
        A (`torch.Tensor` of shape `(rank, in_features)`): Factor A.
        B (`torch.Tensor` of shape `(out_features, rank)`): Factor B.
        fan_in_fan_out (`bool`): Whether the base weight is stored as `(in_features, out_features)`.
        scaling (`float`, *optional*, defaults to `1.0`): The scale s.
    """

    A: torch.Tensor
    B: torch.Tensor
    fan_in_fan_out: bool
    scaling: float = 1.0


@dataclass(frozen=True)
class Term:
    """
    One product `diag(weight) * s * B @ A` of a sum.

    Args:
        pair ([`LoraPair`] or [`Factors`]): The factors.
        weight (`float` or `torch.Tensor` of shape `(out_features,)`, *optional*, defaults to `1.0`): The factor of the
            product, or of each of its rows.
    """

    pair: LoraPair | Factors
    weight: float | torch.Tensor = 1.0

    @property
    def A(self) -> torch.Tensor:
        """Factor A in fp64."""
        return self.pair.A.double()

    @property
    def B(self) -> torch.Tensor:
        """Factor B in fp64, with the scale and the weight folded in."""
        weight = self.weight[:, None] if isinstance(self.weight, torch.Tensor) else self.weight
        return self.pair.B.double() * self.pair.scaling * weight


class LowRankUpdate:
    """
    One update a module: a sum of low-rank products, so itself of low rank.

    Args:
        terms (`dict`): Name of each module in the base model -> list of [`Term`].
        sources (list of [`LoraAdapter`]): The adapters it comes from. Base and data of the result are those of the
            first.
        operator (`dict`): How it came about, for `unlearning.json`.
    """

    def __init__(self, terms: dict[str, list[Term]], sources: Sequence[LoraAdapter], operator: dict[str, Any]) -> None:
        self.terms = dict(sorted(terms.items()))
        self.sources = list(sources)
        self.operator = operator

    @classmethod
    def of(cls, adapter: LoraAdapter) -> LowRankUpdate:
        """The update of one adapter as it is."""
        terms = {module: [Term(pair)] for module, pair in adapter.modules.items()}
        return cls(terms, [adapter], operator_record("none", [adapter]))

    @property
    def modules(self) -> list[str]:
        """Names of the modules that change."""
        return list(self.terms)

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of `module` in fp64, those of the terms concatenated: `B @ A` is the sum of the products."""
        terms = self.terms[module]
        return torch.cat([term.A for term in terms]), torch.cat([term.B for term in terms], dim=1)

    def ranks(self) -> dict[str, int]:
        """Rank of the factors of each module."""
        return {module: sum(len(term.pair.A) for term in terms) for module, terms in self.terms.items()}

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the update of each module."""
        products = {module: _inner(*self.factors(module), *self.factors(module)) for module in self.terms}
        return {module: math.sqrt(max(0.0, product)) for module, product in products.items()}

    def inner(self, other: LowRankUpdate) -> float:
        """Inner product of the two updates, over the modules of both; from r x r matrices."""
        common = [module for module in self.terms if module in other.terms]
        return math.fsum(_inner(*self.factors(module), *other.factors(module)) for module in common)

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole update."""
        return math.hypot(*self.norms().values())

    def best_factors(self, module: str, rank: int) -> tuple[Factors, TensorError]:
        """The best approximation of up to `rank`, by QR of the factors and SVD of what is between them."""
        a, b = self.factors(module)
        (qa, ra), (qb, rb) = torch.linalg.qr(a.T), torch.linalg.qr(b)
        u, values, vt = torch.linalg.svd(rb @ ra.T)
        kept = min(rank, len(values))
        root = values[:kept].sqrt()
        squares = values.square()
        error = TensorError(squares[kept:].sum().item(), squares.sum().item(), changed=True)
        new_a, new_b = (root[:, None] * vt[:kept]) @ qa.T, qb @ (u[:, :kept] * root)
        return Factors(new_a, new_b, self.sources[0].config.fan_in_fan_out), error

    def save(self, output_dir: str | Path, overwrite: bool = False) -> LoraAdapter:
        """
        Write the update as a memorising adapter: plain LoRA in fp32 with a scale of 1, `rank_pattern` where the ranks
        differ.

        Args:
            output_dir (`str` or `Path`): The folder to write; it appears only once it is whole.
            overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.

        Returns:
            [`LoraAdapter`]: The adapter written.
        """
        refuse_overwriting(output_dir, *(source.folder for source in self.sources))
        self._refuse_cancelled()
        with atomic_folder(output_dir, overwrite) as folder:
            self._write_factors(folder / ADAPTER_WEIGHTS_FILE)
            self._config().save_pretrained(str(folder))
            write_provenance(folder, combined_provenance(self.sources[0], self.operator))
            (folder / "README.md").write_text(secret_note("Combined memorising adapter"), encoding="utf-8")
        return LoraAdapter.load(output_dir)

    def _refuse_cancelled(self) -> None:
        products = [_inner(t.A, t.B, t.A, t.B) for terms in self.terms.values() for t in terms]
        if not self.norm > CANCELLED * math.sqrt(math.fsum(products)):
            raise UnlearningError(
                f"Nothing is left of {self.sources[0].id}: the adapters cancel, or all are untrained (every B is "
                "zero). Check that they are different adapters, or choose another weight."
            )

    def _write_factors(self, path: Path) -> None:
        ranks = self.ranks()
        of_name = {
            f"base_model.model.{module}.lora_{factor}.weight": (module, factor) for module in ranks for factor in "AB"
        }

        def read(name: str) -> torch.Tensor:
            module, factor = of_name[name]
            parts = [getattr(term, factor) for term in self.terms[module]]
            tensor = torch.cat(parts, dim="AB".index(factor)).float()
            if not torch.isfinite(tensor).all():
                raise UnlearningError(f"{name!r} overflows fp32. Use smaller weights.")
            return tensor

        entries = []
        for name, (module, factor) in of_name.items():
            pair, rank = self.terms[module][0].pair, ranks[module]
            shape = (rank, pair.A.shape[1]) if factor == "A" else (pair.B.shape[0], rank)
            entries.append((name, "F32", shape, FP32_BYTES * math.prod(shape)))
        write_shard(path, entries, read)

    def _config(self) -> LoraConfig:
        first, ranks = self.sources[0].config, self.ranks()
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
        return LoraConfig(
            task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path,
            revision=first.revision,
            r=usual,
            lora_alpha=usual,
            rank_pattern=others,
            alpha_pattern=dict(others),
            target_modules=sorted(ranks),
            fan_in_fan_out=first.fan_in_fan_out,
            inference_mode=True,
        )


def _inner(a: torch.Tensor, b: torch.Tensor, other_a: torch.Tensor, other_b: torch.Tensor) -> float:
    """Sum of the products of the entries of `b @ a` and `other_b @ other_a`."""
    return ((b.T @ other_b) * (a @ other_a.T)).sum().item()


def truncate(update: LoraAdapter | LowRankUpdate, rank: int) -> tuple[LowRankUpdate, RealisedError]:
    """
    The best approximation of an update by one of a smaller rank in every module.

    Args:
        update ([`LoraAdapter`], [`LowRankUpdate`] or [`SignConsensus`]): The update. Of a sign consensus, which has no
            factors, one module at a time is built.
        rank (`int`): The largest rank.

    Returns:
        `tuple` of [`LowRankUpdate`] and [`RealisedError`]: The approximation, and its relative error in Frobenius norm,
            of each module and overall.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UnlearningError(f"`rank` must be a whole number above 0, got {rank!r}.")
    if type(update) is LoraAdapter:
        update = LowRankUpdate.of(update)
    errors, terms = RealisedError(), {}
    for module in tqdm(update.modules, desc=f"Truncating to rank {rank}", leave=False):
        factors, errors.tensors[module] = update.best_factors(module, rank)
        terms[module] = [Term(factors)]
    operator = {**update.operator, "truncated_to_rank": rank, "truncation_error": errors.to_dict()}
    return LowRankUpdate(terms, update.sources, operator), errors


def operator_record(name: str, sources: Sequence[LoraAdapter], **options: Any) -> dict[str, Any]:
    """
    What `unlearning.json` says of an operator.

    Args:
        name (`str`): Name of the operator.
        sources (list of [`LoraAdapter`]): The adapters it combines.
        options: Its options.
    """
    return {"name": name, **options, "sources": [_source_record(source) for source in sources]}


def _source_record(source: LoraAdapter) -> dict[str, Any]:
    record = {
        "id": source.id,
        "sha256": source.sha256,
        "base": (source.provenance.get("base") or {}).get("id") or source.config.base_model_name_or_path,
    }
    return record | {key: source.provenance[key] for key in ("operator",) if key in source.provenance}


def combined_provenance(first: LoraAdapter, operator: dict[str, Any]) -> dict[str, Any]:
    """
    Content of the `unlearning.json` of a combination.

    Args:
        first ([`LoraAdapter`]): The adapter whose base and data it has.
        operator (`dict`): Record of the operator.
    """
    named = {"id": first.config.base_model_name_or_path, "revision": first.config.revision, "fingerprint": None}
    return {
        "method": "model-extrapolation",
        "kind": "adapter",
        "operator": operator,
        "base": {**named, **(first.provenance.get("base") or {})},
        "data": first.provenance.get("data", {}),
        "versions": package_versions(),
    }


def check_combinable(adapters: Sequence[LoraAdapter], same_base: bool = True) -> None:
    """Refuse adapters whose updates cannot be added: forget adapters, other bases (with `same_base`), other shapes."""
    first = adapters[0]
    for adapter in adapters:
        adapter.refuse_result()
        if adapter.config.fan_in_fan_out != first.config.fan_in_fan_out:
            raise UnlearningError(
                f"{first.id} and {adapter.id} differ in `fan_in_fan_out`, so they are of different kinds of layers. "
                "Combine adapters of one base model."
            )
        for module in first.modules.keys() & adapter.modules.keys():
            shapes = [source.modules[module].delta_shape for source in (first, adapter)]
            if shapes[0] != shapes[1]:
                raise UnlearningError(
                    f"The updates of {module!r} have shape {shapes[0]} in {first.id} and {shapes[1]} in {adapter.id}. "
                    "Combine adapters of one base model."
                )
        if same_base and adapter is not first:
            _check_same_base(first, adapter)


def _check_same_base(first: LoraAdapter, other: LoraAdapter) -> None:
    prints = [(adapter.provenance.get("base") or {}).get("fingerprint") for adapter in (first, other)]
    if None in prints or prints[0]["dtype"] != prints[1]["dtype"]:
        logger.warning(
            f"That {first.id} and {other.id} were trained on one base model cannot be checked: one of them has no "
            "fingerprint of it, or that of another precision."
        )
        return
    tensors, others = prints[0]["tensors"], prints[1]["tensors"]
    differing = [name for name, digest in tensors.items() if others.get(name) != digest]
    if differing:
        raise UnlearningError(
            f"{first.id} and {other.id} were trained on different base models: their fingerprints differ in "
            f"{differing[0]!r}. Their updates start from different weights and cannot be added: train both on the same "
            "base (for a retain vector, both on the clean checkpoint, and extrapolate with --base and --no_check_base)."
        )
