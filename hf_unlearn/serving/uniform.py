"""One rank and one scale for all modules of an adapter, which servers expect and training need not give."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import (
    ADAPTER_WEIGHTS_FILE,
    FORGET_ADAPTER_KIND,
    LoraAdapter,
    refuse_overwriting,
)
from hf_unlearn.extrapolation.checkpoint import DTYPE_CODES, atomic_folder, write_shard
from hf_unlearn.extrapolation.provenance import write_provenance


def load_result(adapter: str | Path) -> LoraAdapter:
    """
    Read an adapter that is made to be used as it is, and refuse one that memorises.

    Args:
        adapter (`str` or `Path`): Local folder or Hub id.
    """
    loaded = LoraAdapter.load(adapter)
    if not loaded.is_result:
        raise UnlearningError(
            f"{adapter} is no forget adapter (its unlearning.json does not say `{FORGET_ADAPTER_KIND}`): served, it "
            "would state what is to be forgotten. Write the forget adapter with `hf-unlearn extrapolate --adapter "
            f"{adapter} --alpha ALPHA --format adapter`, and export that."
        )
    return loaded


def write_uniform(adapter: LoraAdapter, output_dir: str | Path, rank: int, overwrite: bool = False) -> LoraAdapter:
    """
    Write the same update with one `r` and one `lora_alpha`, as plain LoRA without patterns and rsLoRA.

    The factors get rows and columns of zeros. Where all modules have one scale, their values stay as they are, bit for
    bit. Otherwise the scale that most modules have is kept, the B of the others is multiplied by what is missing, and
    everything is stored in fp32.

    Args:
        adapter ([`LoraAdapter`]): The adapter.
        output_dir (`str` or `Path`): The folder to write.
        rank (`int`): The rank of every module, no smaller than any it has.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.

    Returns:
        [`LoraAdapter`]: The adapter written. Its `unlearning.json` is that of the source with a `serving` record.
    """
    refuse_overwriting(output_dir, adapter.folder)
    scale = Counter(pair.scaling for pair in adapter.modules.values()).most_common(1)[0][0]
    with atomic_folder(output_dir, overwrite) as folder:
        _write_factors(adapter, rank, scale, folder / ADAPTER_WEIGHTS_FILE)
        alpha = rank * scale
        config = LoraConfig(
            task_type=adapter.config.task_type,
            base_model_name_or_path=adapter.config.base_model_name_or_path,
            revision=adapter.config.revision,
            r=rank,
            lora_alpha=int(alpha) if alpha.is_integer() else alpha,
            target_modules=sorted(adapter.modules),
            fan_in_fan_out=adapter.config.fan_in_fan_out,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        record = {"rank": rank, "lora_alpha": alpha, "source": {"id": adapter.id, "sha256": adapter.sha256}}
        write_provenance(folder, adapter.provenance | {"serving": record})
    return LoraAdapter.load(output_dir)


def _write_factors(adapter: LoraAdapter, rank: int, scale: float, path: Path) -> None:
    pairs = {name: pair for pair in adapter.modules.values() for name in (pair.name_a, pair.name_b)}
    one_scale = all(pair.scaling == scale for pair in pairs.values())

    def read(name: str) -> torch.Tensor:
        pair = pairs[name]
        tensor, dim = adapter.file.read(name), int(name == pair.name_b)
        if not one_scale:
            tensor = tensor.double() * (pair.scaling / scale if dim else 1)
            tensor = tensor.float()
        padding = list(tensor.shape)
        padding[dim] = rank - padding[dim]
        return torch.cat([tensor, tensor.new_zeros(padding)], dim=dim)

    entries = []
    for name, pair in pairs.items():
        info, dim = adapter.file.tensors[name], int(name == pair.name_b)
        shape = (info.shape[0], rank) if dim else (rank, info.shape[1])
        dtype = info.dtype if one_scale else DTYPE_CODES[torch.float32]
        size = info.nbytes // info.numel if one_scale else torch.float32.itemsize
        entries.append((name, dtype, shape, size * math.prod(shape)))
    write_shard(path, entries, read)
