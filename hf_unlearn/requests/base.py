"""Which base model a ledger belongs to, and whether an adapter or a live model is of the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import (
    LoraAdapter,
    SafetensorsCheckpoint,
    fingerprint_files,
    resolve_model,
    verify_fingerprint,
    verify_fingerprint_files,
)
from hf_unlearn.extrapolation.fingerprint import is_quantised


logger = logging.getLogger(__name__)

ONE_BASE = (
    "All requests of a ledger are trained on one base, and none on a model that was built from it: their updates start "
    "from the same weights and are added. Train it again on the base of the ledger, or open another ledger."
)


def base_record(adapter: LoraAdapter, base: str | None) -> dict[str, Any]:
    """
    Id, revision and fingerprint of the base of an adapter.

    Args:
        adapter ([`LoraAdapter`]): The first adapter of a ledger.
        base (`str`, *optional*): Id or folder of the base; what the adapter names if not given.
    """
    recorded = adapter.provenance.get("base") or {}
    name = base or _named(adapter)
    if not name:
        raise UnlearningError(f"{adapter.id} does not say which base it was trained on. Name it with --base.")
    name = _absolute(name)
    revision = recorded.get("revision") if name == _absolute(recorded.get("id") or name) else None
    fingerprint = recorded.get("fingerprint")
    if fingerprint is None:
        logger.warning(
            f"{adapter.id} has no fingerprint of its base: that it was trained on {name} cannot be checked."
        )
        fingerprint = fingerprint_files(SafetensorsCheckpoint(resolve_model(name, revision)))
    return {"id": name, "revision": revision, "fingerprint": fingerprint}


def check_same_base(known: dict[str, Any], adapter: LoraAdapter, base: str | None) -> None:
    """
    Refuse an adapter of another base than that of a ledger.

    Args:
        known (`dict`): Record of the base of the ledger.
        adapter ([`LoraAdapter`]): The adapter.
        base (`str`, *optional*): What the user says its base is, for an adapter that has no fingerprint of it.
    """
    fingerprint, recorded = (adapter.provenance.get("base") or {}).get("fingerprint"), known["fingerprint"]
    if fingerprint is None:
        name = _absolute(base or _named(adapter) or "?")
        if name != known["id"]:
            raise UnlearningError(
                f"{adapter.id} has no fingerprint of its base and names {name}, while the base of the ledger is "
                f"{known['id']}. {ONE_BASE} If it is the same model, say so with --base {known['id']}."
            )
        logger.warning(f"That {adapter.id} was trained on {name} cannot be checked: it has no fingerprint of it.")
        return
    common = fingerprint["tensors"].keys() & (recorded or {"tensors": {}})["tensors"].keys()
    if common and fingerprint["dtype"] == recorded["dtype"]:
        differing = sorted(name for name in common if fingerprint["tensors"][name] != recorded["tensors"][name])
        if differing:
            raise UnlearningError(
                f"{adapter.id} was trained on another base than {known['id']}: {differing[0]!r} has other values. "
                f"{ONE_BASE}"
            )
        return
    try:  # in another precision: only the files can tell
        verify_fingerprint_files(fingerprint, SafetensorsCheckpoint(resolve_model(known["id"], known["revision"])))
    except UnlearningError as error:
        raise UnlearningError(f"{adapter.id} cannot be added: {error} {ONE_BASE}") from error


def check_model(known: dict[str, Any], model: str, revision: str | None) -> None:
    """Refuse a model in files that is not the base of a ledger."""
    if known["fingerprint"] is None:
        return
    try:
        verify_fingerprint_files(known["fingerprint"], SafetensorsCheckpoint(resolve_model(model, revision)))
    except UnlearningError as error:
        raise UnlearningError(f"{model} is not the base of the ledger, {known['id']}: {error} {ONE_BASE}") from error


def check_live_base(known: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse a live model that is not the base; one in a narrower precision or quantised cannot be checked."""
    fingerprint = known["fingerprint"]
    bits = torch.finfo(getattr(torch, fingerprint["dtype"])).bits if fingerprint else 0
    if fingerprint and not is_quantised(model) and torch.finfo(model.dtype).bits >= bits:
        verify_fingerprint(fingerprint, dict(model.named_parameters()).get)


def _named(adapter: LoraAdapter) -> str | None:
    """The base that an adapter names."""
    return adapter.config.base_model_name_or_path or (adapter.provenance.get("base") or {}).get("id")


def _absolute(name: str) -> str:
    """A folder by its absolute path, a Hub id as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name
