"""Operators: memorising adapters in, one direction out. Each result is extrapolated like the update of one adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter, LoraPair
from hf_unlearn.extrapolation.low_rank import LowRankUpdate, Term, check_combinable, operator_record


DEFAULT_ETA = 0.675

_CHECKPOINT = re.compile(r"checkpoint-(?P<step>\d+)")
# A row of the retain update whose squared norm is this small against its factors is rounding, not a direction.
_NO_DIRECTION = 1e-12

Adapter = LoraAdapter | str | Path


def average(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> LowRankUpdate:
    """
    The weighted sum of the adapters' updates, exact: the products are added, by concatenating the factors, and not A
    and B apart. A module that an adapter leaves alone counts as zero there.

    Args:
        adapters (list of [`LoraAdapter`], `str` or `Path`): Memorising adapters of one base.
        weights (list of `float`, *optional*): Weight of each; equal ones that sum to 1 if not given.
    """
    loaded = _load(adapters)
    weights = [1 / len(loaded)] * len(loaded) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(loaded) or not all(map(math.isfinite, weights)):
        raise UnlearningError(f"`weights` must be {len(loaded)} finite numbers, one for each adapter, got {weights}.")
    return _weighted_sum(loaded, weights, operator_record("average", loaded, weights=weights))


def momentum_weights(n: int, eta: float = DEFAULT_ETA) -> list[float]:
    """
    Weights of `n` snapshots in the average m_t = eta * snapshot_t + (1 - eta) * m_(t-1), which starts at the first.

    Args:
        n (`int`): Number of snapshots, in the order of the training.
        eta (`float`, *optional*, defaults to `0.675`): Weight of the newest, above 0 and below 1.

    Returns:
        `list[float]`: the weights, which sum to 1.
    """
    if not 0 < eta < 1:
        raise UnlearningError(f"`eta={eta}` is not possible: it must be above 0 and below 1 (the paper uses 0.675).")
    if n < 1:
        raise UnlearningError(f"There are no weights of {n} snapshots. Pass one or more.")
    return [(1 - eta) ** (n - 1), *(eta * (1 - eta) ** (n - t) for t in range(2, n + 1))]


def momentum(snapshots: Sequence[Adapter] | str | Path, eta: float = DEFAULT_ETA) -> LowRankUpdate:
    """
    The exponential moving average of the updates of one run (the momentum variant of arXiv 2602.06441).

    Args:
        snapshots (`str`, `Path`, or list of [`LoraAdapter`], `str` or `Path`): The folder of a run, whose
            `checkpoint-*` folders are taken by step, or the snapshots in the order of the training.
        eta (`float`, *optional*, defaults to `0.675`): Weight of the newest snapshot.
    """
    loaded = _load(run_checkpoints(snapshots) if isinstance(snapshots, (str, Path)) else snapshots)
    return _weighted_sum(loaded, momentum_weights(len(loaded), eta), operator_record("momentum", loaded, eta=eta))


def run_checkpoints(run: str | Path) -> list[Path]:
    """The `checkpoint-*` folders of a run, by step; at least two."""
    folder = Path(run).expanduser()
    found = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    if len(found) < 2:
        raise UnlearningError(
            f"{run} holds {len(found)} `checkpoint-*` folders; momentum needs two or more. Train with "
            "--save_strategy epoch and without --save_total_limit, or name the snapshots themselves."
        )
    return sorted(found, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)["step"]))


def subtract(adapter: Adapter, other: Adapter, weight: float) -> LowRankUpdate:
    """
    `delta_W - weight * delta_W_other`: extrapolated by alpha, the forget model is
    theta_ref - alpha * delta_W + weight * alpha * delta_W_other.

    With an adapter of the retain rows it is the retain vector (MSA, arXiv 2506.20941), with one that was trained on
    target answers the targeted variant.

    Args:
        adapter ([`LoraAdapter`], `str` or `Path`): The memorising adapter.
        other ([`LoraAdapter`], `str` or `Path`): The adapter to move towards.
        weight (`float`): Its weight, above 0.
    """
    if not 0 < weight < math.inf:
        raise UnlearningError(
            f"`weight={weight}` is not possible: it must be a finite number above 0. To move away from both adapters, "
            "use `average`."
        )
    loaded = _load([adapter, other])
    return _weighted_sum(loaded, [1.0, -float(weight)], operator_record("subtract", loaded, weight=float(weight)))


def sum_of_rounds(rounds: Sequence[Adapter], alpha: float) -> LowRankUpdate:
    """
    `alpha` times the sum of the updates of successive rounds: with alpha = 1 it leads from the base of the first round to
    the forget model of the last.

    Args:
        rounds (list of [`LoraAdapter`], `str` or `Path`): The adapter of each round, in order. Each was trained on the
            forget model that was made from the one before (see [`train_in_rounds`]), by its `unlearning.json`.
        alpha (`float`): Step of every round, above 0.
    """
    loaded = _load(rounds, same_base=False)
    for before, after in pairwise(loaded):
        base_before, base_after = (adapter.provenance.get("base") or {} for adapter in (before, after))
        expected = {"sha256": before.sha256, "alpha": alpha, "base_fingerprint": base_before.get("fingerprint")}
        if base_after.get("forget_model_of") != expected:
            raise UnlearningError(
                f"{after.id} was not trained on the forget model that {before.id} gives at alpha={alpha}, or its "
                "unlearning.json does not say so. Pass the rounds of one run, in order and with the step of that run."
            )
    operator = operator_record("rounds", loaded, rounds=len(loaded), round_alpha=float(alpha))
    return _weighted_sum(loaded, [float(alpha)] * len(loaded), operator)


def project(adapter: Adapter, retain_adapter: Adapter) -> LowRankUpdate:
    """
    The part of the memorising update that a retain adapter does not share (after Ext-Sub, arXiv 2308.08090): from each row,
    which is one output feature, its component along the same row of the retain update is taken away.

    The result has the factors B' = [s_m B_m, -diag(c) s_r B_r] and A' = [A_m; A_r] with
    c_i = <m_i, r_i> / <r_i, r_i>, computed from A_m A_r^T and A_r A_r^T.

    Args:
        adapter ([`LoraAdapter`], `str` or `Path`): The memorising adapter.
        retain_adapter ([`LoraAdapter`], `str` or `Path`): An adapter trained on the retain rows.
    """
    memory, retain = _load([adapter, retain_adapter])
    terms = {}
    for module, pair in memory.modules.items():
        terms[module] = [Term(pair)]
        if module in retain.modules:
            shared = _row_coefficients(pair, retain.modules[module])
            terms[module].append(Term(retain.modules[module], -shared))
    return LowRankUpdate(terms, [memory, retain], operator_record("projection", [memory, retain]))


def _row_coefficients(memory: LoraPair, retain: LoraPair) -> torch.Tensor:
    """c of [`project`] in fp64, 0 where the row of the retain update is zero or rounding; shape `(out_features,)`."""
    (a, b), (a_retain, b_retain) = [(term.A, term.B) for term in (Term(memory), Term(retain))]
    gram = a_retain @ a_retain.T
    products = ((b @ (a @ a_retain.T)) * b_retain).sum(1)
    squares = ((b_retain @ gram) * b_retain).sum(1)
    has_direction = squares > _NO_DIRECTION * b_retain.square().sum(1) * gram.trace()
    return torch.where(has_direction, products / squares, 0.0)


def scale_layers(adapter: Adapter, factors: Mapping[str, float]) -> LowRankUpdate:
    """
    Every module with an alpha of its own: its update is multiplied by a factor.

    Args:
        adapter ([`LoraAdapter`], `str` or `Path`): The memorising adapter.
        factors (`dict`): Name of every module -> its factor, at least 0. A module with the factor 0 is left out.
    """
    (loaded,) = _load([adapter])
    if factors.keys() != loaded.modules.keys():
        name = min(factors.keys() ^ loaded.modules.keys())
        where = "is no module of the adapter" if name in factors else "has no factor"
        raise UnlearningError(f"{name!r} {where} {loaded.id}. Give one factor for each of its modules.")
    for module, factor in factors.items():
        if not 0 <= factor < math.inf:
            raise UnlearningError(f"The factor of {module!r} is {factor}: it must be a finite number of at least 0.")
    terms = {module: [Term(pair, factors[module])] for module, pair in loaded.modules.items() if factors[module] > 0}
    if not terms:
        raise UnlearningError("Every factor is 0, so nothing is left of the update. Give one above 0.")
    return LowRankUpdate(terms, [loaded], operator_record("scale_layers", [loaded], factors=dict(factors)))


def fisher_factors(
    adapter: Adapter, forget_fisher: Mapping[str, float], retain_fisher: Mapping[str, float]
) -> dict[str, float]:
    """
    Factors for [`scale_layers`]: large where the forget rows move a module and the retain rows do not, in proportion to
    F_forget / (F_forget + F_retain) (PerTA, arXiv 2601.22030; FILA, arXiv 2408.06621).

    Their mean, weighted by the Frobenius norm of each module's update, is 1: the norms of the scaled updates sum to
    what those of the updates sum to, so an alpha means about as much as before.

    Args:
        adapter ([`LoraAdapter`], `str` or `Path`): The memorising adapter.
        forget_fisher (`dict`): Name of each module -> value of [`layer_fisher`] on the forget rows.
        retain_fisher (`dict`): The same on the retain rows.

    Returns:
        `dict[str, float]`: name of each module -> its factor.
    """
    (loaded,) = _load([adapter])
    norms = LowRankUpdate.of(loaded).norms()
    for name, fisher in {"forget": forget_fisher, "retain": retain_fisher}.items():
        missing = norms.keys() - fisher.keys()
        if missing:
            raise UnlearningError(
                f"`{name}_fisher` has no value of {min(missing)!r}. Measure it with `layer_fisher` on a model that has "
                "this adapter."
            )
    totals = {module: forget_fisher[module] + retain_fisher[module] for module in norms}
    shares = {module: forget_fisher[module] / total if total > 0 else 0.0 for module, total in totals.items()}
    mean = math.fsum(norms[module] * shares[module] for module in norms) / (math.fsum(norms.values()) or math.nan)
    if not mean > 0:
        raise UnlearningError(
            "The forget rows have no gradient in any module of the adapter, or it is untrained (every B is zero). "
            "Measure `layer_fisher` on a trained adapter, with rows that have an answer."
        )
    return {module: share / mean for module, share in shares.items()}


def _weighted_sum(adapters: list[LoraAdapter], weights: list[float], operator: dict[str, Any]) -> LowRankUpdate:
    terms: dict[str, list[Term]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module, pair in adapter.modules.items():
            terms.setdefault(module, []).append(Term(pair, weight))
    return LowRankUpdate(terms, adapters, operator)


def _load(adapters: Sequence[Adapter], same_base: bool = True) -> list[LoraAdapter]:
    """The adapters, loaded and checked against each other."""
    if not adapters:
        raise UnlearningError("There are no adapters to combine. Pass one or more.")
    loaded = [adapter if isinstance(adapter, LoraAdapter) else LoraAdapter.load(adapter) for adapter in adapters]
    check_combinable(loaded, same_base)
    return loaded
