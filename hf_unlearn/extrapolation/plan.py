"""What a merge would write, and every reason why it cannot be written, before anything is."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter, refuse_overwriting
from hf_unlearn.extrapolation.arithmetic import (
    COPY_BYTES,
    FLOAT_DTYPES,
    RealisedError,
    check_alpha,
    compute_threads,
    parse_dtype,
    row_pieces,
)
from hf_unlearn.extrapolation.checkpoint import (
    DTYPE_CODES,
    INDEX_FILE,
    TORCH_DTYPES,
    SafetensorsCheckpoint,
    TensorInfo,
    find_tensor,
)
from hf_unlearn.extrapolation.fingerprint import fingerprint_files
from hf_unlearn.extrapolation.model_config import CONFIG_FILE, read_model_config
from hf_unlearn.extrapolation.provenance import PROVENANCE_FILE
from hf_unlearn.extrapolation.remote import HubShard, open_base, verify_base


logger = logging.getLogger(__name__)

TEMPLATE_FOLDER = "additional_chat_templates"
# Weights of any format, and what describes the base and not the result.
NOT_COPIED_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz", ".md",
}  # fmt: skip
NOT_COPIED_NAMES = {PROVENANCE_FILE, CONFIG_FILE, "trainer_state.json"}
FP32_BYTES = 4


@dataclass
class MergePlan:
    """
    What a merge would write.

    Args:
        output_dir (`Path`): The folder that would be written.
        alpha (`float`): The extrapolation factor.
        dtype (`torch.dtype` or `None`): Output dtype; `None` keeps each tensor's.
        files (`dict`): File name -> size in bytes; that of JSON files is approximate.
        adapted (`dict`): Name of each tensor that changes -> module of the adapter.
        peak_memory (`int`): Estimate of the memory the merge needs besides Python and its libraries, in bytes.
        checkpoint (`SafetensorsCheckpoint`): The base.
        adapter (`LoraAdapter`): The memorising adapter.
        base (`dict`): Id, revision and fingerprint of the base; the last is `None` where it is not known yet.
        downloads (`dict`): Name of each weights file that has to be downloaded -> size in bytes.
        delete_cache (`bool`): Whether these files are kept only until they are merged.
        verify (`bool`): Whether each of these files is checked against the adapter's record before it is merged.
    """

    output_dir: Path
    alpha: float
    dtype: torch.dtype | None
    files: dict[str, int]
    adapted: dict[str, str]
    peak_memory: int
    checkpoint: SafetensorsCheckpoint = field(repr=False)
    adapter: LoraAdapter = field(repr=False)
    base: dict[str, Any] = field(repr=False)
    downloads: dict[str, int]
    delete_cache: bool
    verify: bool

    @property
    def download_bytes(self) -> int:
        """Bytes to download."""
        return sum(self.downloads.values())

    @property
    def total_bytes(self) -> int:
        """Disk space the result needs, in bytes."""
        return sum(self.files.values())

    def needed_space(self) -> dict[Path, int]:
        """Existing folder -> bytes needed on its disk. The files are downloaded beside the result if not kept."""
        output = _existing(self.output_dir)
        cache = _existing(Path(constants.HF_HUB_CACHE))
        if self.delete_cache or not self.downloads or os.stat(output).st_dev == os.stat(cache).st_dev:
            kept = max(self.downloads.values(), default=0) if self.delete_cache else self.download_bytes
            return {output: self.total_bytes + kept}
        return {output: self.total_bytes, cache: self.download_bytes}

    def output_dtype(self, info: TensorInfo) -> str:
        """Safetensors code of the dtype in which a tensor of the base is written: only 16- to 64-bit floats change."""
        if self.dtype is None or TORCH_DTYPES.get(info.dtype) not in FLOAT_DTYPES:
            return info.dtype
        return DTYPE_CODES[self.dtype]

    def output_bytes(self, info: TensorInfo) -> int:
        """Number of bytes of that tensor in the result."""
        code = self.output_dtype(info)
        return info.nbytes if code == info.dtype else info.numel * TORCH_DTYPES[code].itemsize

    def provenance(self, errors: RealisedError) -> dict[str, Any]:
        """Content of the `unlearning.json` of the merged model; the dtype is that of the first adapted tensor."""
        dtype = TORCH_DTYPES[self.output_dtype(self.checkpoint.info(next(iter(self.adapted))))]
        return self.adapter.forget_provenance("forget-model", self.alpha, dtype, errors, self.base)


def plan_merge(
    base: str | Path,
    adapter: LoraAdapter | str | Path,
    alpha: float,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    check_base: bool = True,
    delete_cache: bool = False,
) -> MergePlan:
    """
    Everything [`extrapolate`] checks and decides, without writing: the arguments are the same. Of a base on the Hub,
    small files and the headers of the weights are downloaded.

    Returns:
        `MergePlan`: Files, sizes, adapted tensors and a memory estimate.
    """
    alpha = check_alpha(alpha)
    dtype = None if dtype is None else parse_dtype(dtype)
    checkpoint = open_base(base, revision)
    folder = checkpoint.folder
    if not isinstance(adapter, LoraAdapter):
        adapter = LoraAdapter.load(adapter)
    adapter.refuse_result()
    refuse_overwriting(output_dir, folder, adapter.folder)
    _check_config(folder, adapter)
    adapted = match_modules(adapter, checkpoint)
    fingerprint = _check_base(checkpoint, adapter) if check_base else None
    if not check_base:
        logger.warning("The base model is not checked against the adapter's fingerprint (`check_base=False`).")
    if folder.parent.name == "snapshots":  # a Hub download: the folder is named after the commit
        revision = folder.name
    downloads = {name: shard.size for name, shard in checkpoint.shards.items() if isinstance(shard, HubShard)}
    if fingerprint is None and not downloads:
        fingerprint = fingerprint_files(checkpoint)
    plan = MergePlan(
        output_dir=Path(output_dir),
        alpha=alpha,
        dtype=dtype,
        files={},
        adapted=adapted,
        peak_memory=0,
        checkpoint=checkpoint,
        adapter=adapter,
        base={"id": str(base), "revision": revision, "fingerprint": fingerprint},
        downloads=downloads,
        delete_cache=delete_cache,
        verify=check_base and fingerprint is not None,
    )
    _measure(plan)
    return plan


def match_modules(adapter: LoraAdapter, checkpoint: SafetensorsCheckpoint) -> dict[str, str]:
    """Tensor of the checkpoint -> module of the adapter; every module must match one tensor, of the right shape."""
    adapted: dict[str, str] = {}
    for module, pair in adapter.modules.items():
        tensor = find_tensor(f"{module}.weight", checkpoint)
        if tensor is None:
            raise UnlearningError(
                f"The adapter's module {module!r} has no weight in {checkpoint.folder}. Most likely the adapter was "
                "trained on another base model, or the weight is tied or fused in the files. Pass the base of the "
                "training."
            )
        if tensor in adapted:
            raise UnlearningError(
                f"The adapter's modules {module!r} and {adapted[tensor]!r} both match {tensor!r}. Pass the base of the "
                "training."
            )
        shape = checkpoint.info(tensor).shape
        if shape != pair.delta_shape:
            raise UnlearningError(
                f"{tensor!r} has shape {shape} in {checkpoint.folder}, the adapter's update of {module!r} "
                f"{pair.delta_shape}. The adapter was trained on another base model: pass that one."
            )
        adapted[tensor] = module
    return adapted


def _check_config(folder: Path, adapter: LoraAdapter) -> None:
    config = read_model_config(folder)
    if config.get("quantization_config"):
        raise UnlearningError(
            f"{folder} holds a quantised model, which cannot be changed without quantising it again. Merge into the "
            "16- or 32-bit base, or save the forget adapter with `save_forget_adapter`."
        )
    heads = [module for module in adapter.modules if module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES]
    if heads:
        raise UnlearningError(
            f"The adapter changes {heads[0]!r}, which may share its weight with the embeddings: the merge would then "
            "change both. Train without it in `target_modules`."
        )


def _check_base(checkpoint: SafetensorsCheckpoint, adapter: LoraAdapter) -> dict[str, Any] | None:
    """Verify what is here of the base against the adapter's record, and return the recorded fingerprint, if any."""
    fingerprint = (adapter.provenance.get("base") or {}).get("fingerprint")
    if fingerprint is None:
        logger.warning(
            f"{adapter.id} has no fingerprint of its base model in {PROVENANCE_FILE}: that {checkpoint.folder} is the "
            "model it was trained on cannot be checked."
        )
        return None
    verify_base(fingerprint, checkpoint)
    return fingerprint


def _measure(plan: MergePlan) -> None:
    """Fill in the sizes of the files to write and the memory estimate."""
    for name, shard in plan.checkpoint.shards.items():
        plan.files[name] = sum(plan.output_bytes(info) for info in shard.tensors.values())
        plan.peak_memory = max([plan.peak_memory, *(_working_set(plan, info) for info in shard.tensors.values())])
    for path in [plan.checkpoint.folder / CONFIG_FILE, *copied_files(plan.checkpoint.folder)]:
        plan.files[str(path.relative_to(plan.checkpoint.folder))] = path.stat().st_size
    if plan.checkpoint.index:
        plan.files[INDEX_FILE] = (plan.checkpoint.folder / INDEX_FILE).stat().st_size
    plan.files[PROVENANCE_FILE] = len(json.dumps(plan.provenance(RealisedError()), indent=2))


def _working_set(plan: MergePlan, info: TensorInfo) -> int:
    """Bytes in memory while tensor `info` is copied or merged, piece by piece."""
    if info.name not in plan.adapted:
        return 2 * min(info.nbytes + plan.output_bytes(info), COPY_BYTES)
    rows, columns = info.shape
    piece = max(last - first for first, last in row_pieces(rows, columns)) * columns
    pair = plan.adapter.modules[plan.adapted[info.name]]
    factors = [pair.file.tensors[name] for name in (pair.name_a, pair.name_b)]
    # of each thread stored, result, and in fp32 base, update, sum and realised update; two results that are written
    stored, result = info.nbytes // info.numel, plan.output_bytes(info) // info.numel
    working = piece * (compute_threads() * (stored + result + 4 * FP32_BYTES) + 2 * result)
    return working + sum(factor.nbytes + FP32_BYTES * factor.numel for factor in factors)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.expanduser().resolve()
    return path if path.exists() else _existing(path.parent)


def copied_files(folder: Path) -> list[Path]:
    """The base's small files that also describe the result: tokenizer, generation config, chat templates, code."""
    return [
        path
        for path in [*folder.iterdir(), *(folder / TEMPLATE_FOLDER).glob("*")]
        if path.is_file()
        and not path.name.startswith((".", "adapter_"))
        and not path.name.endswith(".index.json")
        and path.suffix not in NOT_COPIED_SUFFIXES
        and path.name not in NOT_COPIED_NAMES
    ]
