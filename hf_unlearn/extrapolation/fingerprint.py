"""
Which base model an adapter belongs to, by content.

Two bases of one architecture accept each other's adapters without a word. A fingerprint hashes a few elements of a few
tensors, in the dtype in which the model was used, so that it can be checked against live modules and against files of
another precision alike.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import torch
from peft.utils.integrations import gather_params_ctx
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.arithmetic import FLOAT_DTYPES
from hf_unlearn.extrapolation.checkpoint import (
    DTYPE_CODES,
    TORCH_DTYPES,
    SafetensorsCheckpoint,
    find_tensor,
    resolve_model,
)


logger = logging.getLogger(__name__)

MAX_TENSORS = 64
MAX_ELEMENTS = 256


class BaseFingerprint(TypedDict):
    """
    Content of a fingerprint.

    Args:
        dtype (`str`): The dtype the samples were hashed in, such as `"bfloat16"`.
        tensors (`dict`): Name of the tensor -> 16 hexadecimal digits.
    """

    dtype: str
    tensors: dict[str, str]


def fingerprint_model(model: nn.Module) -> BaseFingerprint | None:
    """
    Fingerprint of a live model; adapters on it are looked through.

    Args:
        model (`torch.nn.Module`): The base model or a `PeftModel` around it. Under ZeRO-3, all ranks must call.

    Returns:
        `BaseFingerprint` or `None`: `None` for a quantised base, whose live values are not those of its files; see
            [`fingerprint_files_of`].
    """
    if is_quantised(model):
        return None
    parameters = {
        _base_name(name): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name and parameter.dtype in FLOAT_DTYPES
    }
    return _build({name: parameters[name].dtype for name in parameters}, lambda name: _sample_live(parameters[name]))


def fingerprint_files(checkpoint: SafetensorsCheckpoint) -> BaseFingerprint | None:
    """Fingerprint of a checkpoint in the precision of its files; `None` when it holds no 16- to 64-bit floats."""
    dtypes = {name: TORCH_DTYPES.get(checkpoint.info(name).dtype) for name in checkpoint.names()}
    dtypes = {name: dtype for name, dtype in dtypes.items() if dtype in FLOAT_DTYPES}
    return _build(dtypes, lambda name: _sample_file(checkpoint, name)) if dtypes else None


def fingerprint_files_of(model: PreTrainedModel) -> BaseFingerprint | None:
    """
    Fingerprint of the files that a live model was loaded from: that of a base which is quantised as it is loaded, and
    into whose files the adapter may be merged.

    Args:
        model (`PreTrainedModel`): The base model.

    Returns:
        `BaseFingerprint` or `None`: `None`, with a warning, where there are no such files.
    """
    name = model.config._name_or_path
    try:
        if not name:
            raise UnlearningError("The configuration does not say where the model is from.")
        folder = resolve_model(name, getattr(model.config, "_commit_hash", None))
        return fingerprint_files(SafetensorsCheckpoint(folder))
    except UnlearningError as error:
        logger.warning(f"The quantised base has no fingerprint, so a later merge cannot check its base. {error}")
        return None


def verify_fingerprint(fingerprint: BaseFingerprint, read_tensor: Callable[[str], torch.Tensor | None]) -> None:
    """
    Raise unless every tensor of the fingerprint that can be read has the recorded content.

    Args:
        fingerprint (`BaseFingerprint`): The recorded fingerprint.
        read_tensor (`Callable`): Tensor name -> tensor, or `None` where there is none of that name.
    """

    def sample(name: str) -> tuple[tuple[int, ...], torch.Tensor] | None:
        tensor = read_tensor(name)
        return None if tensor is None else _sample_live(tensor)

    _verify(fingerprint, sample)


def verify_fingerprint_files(fingerprint: BaseFingerprint, checkpoint: SafetensorsCheckpoint) -> None:
    """The same for a checkpoint on disk, of which only the sampled bytes are read."""

    def sample(name: str) -> tuple[tuple[int, ...], torch.Tensor] | None:
        found = find_tensor(name, checkpoint)
        return None if found is None else _sample_file(checkpoint, found)

    _verify(fingerprint, sample)


def is_quantised(model: nn.Module) -> bool:
    """Whether any weight of the model is stored in a k-bit or fp8 format."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(base, "is_quantized", False)) or any(
        parameter.dtype not in FLOAT_DTYPES for name, parameter in base.named_parameters() if "lora_" not in name
    )


def _base_name(name: str) -> str:
    """Name of a parameter in the base model, without what PEFT wraps around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _build(
    dtypes: dict[str, torch.dtype], sample: Callable[[str], tuple[tuple[int, ...], torch.Tensor]]
) -> BaseFingerprint:
    # The narrowest dtype: casting down is the direction in which a wider and a narrower copy agree.
    dtype = min((dtypes[name] for name in _spread(sorted(dtypes))), key=lambda dtype: torch.finfo(dtype).bits)
    tensors = {name: _digest(*sample(name), dtype) for name in _spread(sorted(dtypes))}
    return {"dtype": str(dtype).removeprefix("torch."), "tensors": tensors}


def _spread(names: list[str]) -> Iterator[str]:
    """At most `MAX_TENSORS` names, evenly spaced, the first and the last among them."""
    count = min(MAX_TENSORS, len(names))
    return (names[index * (len(names) - 1) // max(1, count - 1)] for index in range(count))


def _stride(numel: int) -> int:
    """Step between sampled elements: odd, so that the sample does not stay in one column of a matrix."""
    return -(-numel // MAX_ELEMENTS) | 1


@torch.no_grad()
def _sample_live(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.Tensor]:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    with gather_params_ctx(tensor):
        sample = tensor.reshape(-1)[:: _stride(tensor.numel())].cpu().clone()
        return tuple(tensor.shape), sample


def _sample_file(checkpoint: SafetensorsCheckpoint, name: str) -> tuple[tuple[int, ...], torch.Tensor]:
    info = checkpoint.info(name)
    return info.shape, checkpoint.read_sample(name, _stride(info.numel))


def _digest(shape: tuple[int, ...], sample: torch.Tensor, dtype: torch.dtype) -> str:
    content = sample.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(repr(tuple(shape)).encode() + content).hexdigest()[:16]


def _verify(fingerprint: dict[str, Any], sample: Callable[[str], tuple[tuple[int, ...], torch.Tensor] | None]) -> None:
    dtype = getattr(torch, str(fingerprint.get("dtype")), None)
    expected = fingerprint.get("tensors")
    if dtype not in DTYPE_CODES or not isinstance(expected, dict):
        raise UnlearningError(
            "The fingerprint in the adapter's `unlearning.json` is damaged. Restore the file, or go on without the "
            "check with `check_base=False` (`--no_check_base`)."
        )
    compared = 0
    for name, digest in expected.items():
        found = sample(name)
        if found is None:
            continue
        compared += 1
        if _digest(*found, dtype) != digest:
            raise UnlearningError(
                f"This is not the base model the adapter was trained on: {name!r} has other values. Pass the base "
                "(and revision) of the training, or go on without the check with "
                "`check_base=False` (`--no_check_base`)."
            )
    if not compared:
        raise UnlearningError(
            "This is not the base model the adapter was trained on: it holds none of the fingerprint's tensors, "
            f"such as {next(iter(expected), None)!r}. Pass the base (and revision) of the training."
        )
