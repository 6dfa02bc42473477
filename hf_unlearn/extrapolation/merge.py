"""
`theta_ref - alpha * s * B @ A` from files to files: the base's shards are streamed in pieces of a few megabytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter
from hf_unlearn.extrapolation.arithmetic import (
    COPY_BYTES,
    PIECE_ELEMENTS,
    RealisedError,
    TensorError,
    compute_threads,
    extrapolate_weight,
    row_pieces,
)
from hf_unlearn.extrapolation.background import map_in_threads
from hf_unlearn.extrapolation.checkpoint import (
    INDEX_FILE,
    TORCH_DTYPES,
    SafetensorsFile,
    TensorInfo,
    atomic_folder,
    write_shard,
)
from hf_unlearn.extrapolation.fingerprint import fingerprint_files
from hf_unlearn.extrapolation.leftovers import clear_leftovers
from hf_unlearn.extrapolation.model_config import CONFIG_FILE, set_config_dtype, write_json
from hf_unlearn.extrapolation.plan import MergePlan, copied_files, plan_merge
from hf_unlearn.extrapolation.provenance import write_provenance
from hf_unlearn.extrapolation.remote import HubShard, verify_base


# Where files are downloaded that are not to stay, within the temporary output folder.
DOWNLOAD_FOLDER = ".download"


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

    def to_dict(self) -> dict[str, Any]:
        """The report without the provenance, which is in the folder."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "provenance"}


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
    delete_cache: bool = False,
) -> MergeReport:
    """
    Write the forget model `theta_ref - alpha * s * B @ A` as a transformers checkpoint.

    Weights of a base on the Hub that are not in the cache are downloaded one file at a time, after everything else has
    been checked.

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
        delete_cache (`bool`, *optional*, defaults to `False`): Keep weights that this call downloads only until they
            are merged, beside the result instead of in the cache. What is in the cache already stays there.

    Returns:
        `MergeReport`: What was written, and how much of the update survived the cast.
    """
    plan = plan_merge(
        base,
        adapter,
        alpha,
        output_dir,
        revision=revision,
        dtype=dtype,
        check_base=check_base,
        delete_cache=delete_cache,
    )
    _check_disk_space(plan)
    _keep_freed_memory()
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
                with _on_disk(plan, name, folder / DOWNLOAD_FOLDER, progress) as shard:
                    _write_merged_shard(plan, shard, folder / name, errors, bytes_done)
        if plan.base["fingerprint"] is None and not (plan.downloads and plan.delete_cache):
            plan.base["fingerprint"] = fingerprint_files(plan.checkpoint)
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
    clear_leftovers(plan.output_dir.expanduser().resolve())
    for folder, needed in plan.needed_space().items():
        free = shutil.disk_usage(folder).free
        if free < needed:
            what = "The result and the files to download need" if plan.downloads else "The result needs"
            remedy = "" if plan.delete_cache or not plan.downloads else "pass `delete_cache=True` (`--delete_cache`), "
            raise UnlearningError(
                f"{what} {needed:,} bytes, {folder} has {free:,} free. Name another `output_dir`, {remedy}use a "
                "narrower `dtype`, or save the forget adapter with `save_forget_adapter`."
            )


def _keep_freed_memory() -> None:
    """
    Let glibc keep the memory of freed pieces, as it does once a larger block was freed. The kernel takes longer to hand
    out a piece than a core needs to compute it.
    """
    torch.empty(COPY_BYTES, dtype=torch.uint8)


@contextmanager
def _on_disk(plan: MergePlan, name: str, temporary: Path, progress: bool) -> Iterator[SafetensorsFile]:
    """A weights file of the base, downloaded and verified if it was not here."""
    shard = plan.checkpoint.shards[name]
    if not isinstance(shard, HubShard):
        yield shard
        return
    plan.checkpoint.shards[name] = shard.download(temporary if plan.delete_cache else None, progress)
    if plan.verify:
        verify_base(plan.base["fingerprint"], plan.checkpoint, name)
    yield plan.checkpoint.shards[name]
    if plan.delete_cache:
        shutil.rmtree(temporary)


def _write_merged_shard(
    plan: MergePlan, shard: SafetensorsFile, path: Path, errors: RealisedError, bytes_done: tqdm
) -> None:
    def read(tensor: str) -> Iterator[torch.Tensor | np.ndarray]:
        info = shard.tensors[tensor]
        if tensor in plan.adapted:
            pieces = _merged_pieces(plan, shard, info, errors)
        elif plan.output_dtype(info) != info.dtype:
            pieces = _cast_pieces(shard, info, TORCH_DTYPES[plan.output_dtype(info)])
        else:
            pieces = shard.read_byte_pieces(tensor, COPY_BYTES)
        for piece in pieces:
            yield piece
            bytes_done.update(piece.nbytes)

    entries = [
        (info.name, plan.output_dtype(info), info.shape, plan.output_bytes(info)) for info in shard.tensors.values()
    ]
    write_shard(path, entries, read, shard.metadata)


def _merged_pieces(
    plan: MergePlan, shard: SafetensorsFile, info: TensorInfo, errors: RealisedError
) -> Iterator[torch.Tensor]:
    """The forget model's rows of an adapted tensor."""
    module = plan.adapted[info.name]
    dtype = TORCH_DTYPES[plan.output_dtype(info)]
    rows, columns = info.shape

    def merged(piece: tuple[int, int]) -> tuple[torch.Tensor, TensorError]:
        first, last = piece
        weight = shard.read_elements(info.name, first * columns, (last - first) * columns).reshape(-1, columns)
        delta = plan.adapter.delta_rows(module, first, last)
        error = RealisedError()
        result = extrapolate_weight(info.name, weight, delta, plan.alpha, dtype, error)
        return result, error.tensors[info.name]

    for result, error in map_in_threads(merged, row_pieces(rows, columns), compute_threads()):
        errors.count(info.name, error)
        yield result


def _cast_pieces(shard: SafetensorsFile, info: TensorInfo, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for first in range(0, info.numel, PIECE_ELEMENTS):
        yield shard.read_elements(info.name, first, min(PIECE_ELEMENTS, info.numel - first)).to(dtype)


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
