"""
`theta_ref - alpha * s * B @ A` from files to files: the base's shards are streamed, one tensor in memory at a time.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter
from hf_unlearn.extrapolation.arithmetic import RealisedError, extrapolate_weight
from hf_unlearn.extrapolation.checkpoint import INDEX_FILE, TORCH_DTYPES, atomic_folder, write_shard
from hf_unlearn.extrapolation.model_config import CONFIG_FILE, set_config_dtype, write_json
from hf_unlearn.extrapolation.plan import MergePlan, copied_files, plan_merge
from hf_unlearn.extrapolation.provenance import write_provenance


@dataclass
class MergeReport:
    """
    What a merge has written.

    Args:
        output_dir (`Path`): The folder.
        alpha (`float`): The extrapolation factor.
        adapted_tensors (`int`): Number of tensors the adapter reaches.
        total_bytes (`int`): Bytes of all files.
        realised_error (`float`): `||realised - wanted|| / ||wanted||` of the whole update.
        worst_tensor (`str`): The tensor with the largest relative error.
        worst_error (`float`): Its relative error.
        provenance (`dict`): Content of the `unlearning.json` written.
    """

    output_dir: Path
    alpha: float
    adapted_tensors: int
    total_bytes: int
    realised_error: float
    worst_tensor: str
    worst_error: float
    provenance: dict[str, Any] = field(repr=False)


def extrapolate(
    base: str | Path,
    adapter: LoraAdapter | str | Path,
    alpha: float,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    check_base: bool = True,
    progress: bool = True,
) -> MergeReport:
    """
    Write the forget model `theta_ref - alpha * s * B @ A` as a transformers checkpoint.

    Args:
        base (`str` or `Path`): Local folder or Hub id of the model the adapter was trained on.
        adapter (`LoraAdapter`, `str` or `Path`): The memorising adapter.
        alpha (`float`): The extrapolation factor, above 0.
        output_dir (`str` or `Path`): The folder to write; it appears only once it is complete.
        revision (`str`, *optional*): Branch, tag or commit of the base on the Hub.
        dtype (`str` or `torch.dtype`, *optional*): Output dtype of the floating-point weights; that of the base if
            not given. The update is added in fp32 and cast once.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.
        check_base (`bool`, *optional*, defaults to `True`): Refuse a base that does not match the adapter's record.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar over the bytes.

    Returns:
        `MergeReport`: What was written, and how much of the update survived the cast.
    """
    plan = plan_merge(base, adapter, alpha, output_dir, revision=revision, dtype=dtype, check_base=check_base)
    _check_disk_space(plan)
    errors = RealisedError()
    with atomic_folder(output_dir, overwrite) as folder:
        bytes_done = tqdm(
            total=sum(plan.files[name] for name in plan.checkpoint.shards),
            unit="B",
            unit_scale=True,
            desc="Extrapolating",
            disable=not progress,
        )
        with bytes_done:
            for name in plan.checkpoint.shards:
                _write_merged_shard(plan, name, folder / name, errors, bytes_done)
        errors.refuse_no_op("Train the adapter for longer, choose a larger alpha, or pass `dtype='float32'`.")
        _write_small_files(plan, folder)
        provenance = plan.provenance(errors)
        write_provenance(folder, provenance)
    return MergeReport(
        output_dir=Path(output_dir),
        alpha=plan.alpha,
        adapted_tensors=len(plan.adapted),
        total_bytes=plan.total_bytes,
        realised_error=errors.relative,
        worst_tensor=errors.worst_tensor,
        worst_error=errors.worst_relative,
        provenance=provenance,
    )


def _check_disk_space(plan: MergePlan) -> None:
    parent = plan.output_dir.expanduser().resolve()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < plan.total_bytes:
        raise UnlearningError(
            f"The result needs {plan.total_bytes:,} bytes, {parent} has {free:,} free. Name another `output_dir`, "
            "use a narrower `dtype`, or save the forget adapter with `save_forget_adapter`."
        )


def _write_merged_shard(plan: MergePlan, name: str, path: Path, errors: RealisedError, bytes_done: tqdm) -> None:
    shard = plan.checkpoint.shards[name]

    def read(tensor: str) -> torch.Tensor | np.ndarray:
        info = shard.tensors[tensor]
        bytes_done.update(plan.output_bytes(info))
        code = plan.output_dtype(info)
        if tensor in plan.adapted:
            delta = plan.adapter.delta(plan.adapted[tensor])
            return extrapolate_weight(tensor, shard.read(tensor), delta, plan.alpha, TORCH_DTYPES[code], errors)
        if code != info.dtype:
            return shard.read(tensor).to(TORCH_DTYPES[code])
        return shard.read_bytes(tensor)

    entries = [
        (info.name, plan.output_dtype(info), info.shape, plan.output_bytes(info)) for info in shard.tensors.values()
    ]
    write_shard(path, entries, read, shard.metadata)


def _write_small_files(plan: MergePlan, folder: Path) -> None:
    source = plan.checkpoint.folder
    for path in copied_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copyfile(source / CONFIG_FILE, folder / CONFIG_FILE)
    if plan.dtype is not None:
        set_config_dtype(folder, plan.dtype)
    if plan.checkpoint.index:
        total = sum(plan.files[name] for name in plan.checkpoint.shards)
        index = plan.checkpoint.index
        metadata = {**index.get("metadata", {}), "total_size": total}
        write_json(folder / INDEX_FILE, {**index, "metadata": metadata})
