"""
Safetensors checkpoints, read and written one tensor at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range) and the
tensors' bytes. Headers are parsed once; no tensor is read before it is asked for, and none is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hf_unlearn.errors import UnlearningError


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
# Second copies of the weights, which some repositories keep beside the ones transformers reads.
IGNORED_PATTERNS = ("*/*.safetensors", "consolidated*", "adapter_*")

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """
    One entry of a safetensors header.

    Args:
        name, shape (`str`, `tuple` of `int`): Name and shape of the tensor.
        dtype (`str`): Safetensors code of the dtype, such as `"BF16"`.
        start (`int`): Offset of the first byte in the file.
        nbytes (`int`): Number of bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


class SafetensorsFile:
    """
    One safetensors file: its header in memory, its tensors on disk.

    Args:
        path (`str` or `Path`): The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UnlearningError(f"{self.path} does not exist. Download or save the checkpoint again.")
        try:
            self.metadata, self.tensors = self._parse_header()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnlearningError(
                f"{self.path} is not a safetensors file ({error}); it may be a Git LFS pointer or cut off. "
                "Download or save it again."
            ) from error
        end = max((info.start + info.nbytes for info in self.tensors.values()), default=0)
        if end > self.path.stat().st_size:
            raise UnlearningError(
                f"{self.path} is truncated: its header promises {end} bytes, it has {self.path.stat().st_size}. "
                "Download or save it again."
            )

    def _parse_header(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > self.path.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), 8 + length + first, last - first)
        return metadata, tensors

    def read_bytes(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`, as a new `uint8` array."""
        info = self.tensors[name]
        return np.fromfile(self.path, dtype=np.uint8, count=info.nbytes, offset=info.start)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, read from disk at every call."""
        info = self.tensors[name]
        dtype = self._torch_dtype(info)
        if not info.numel:
            return torch.empty(info.shape, dtype=dtype)
        return torch.from_numpy(self.read_bytes(name)).view(dtype).reshape(info.shape)

    def read_sample(self, name: str, stride: int) -> torch.Tensor:
        """Every `stride`-th element of tensor `name`, flattened; only these bytes are touched."""
        info = self.tensors[name]
        if not info.numel:
            return self.read(name).reshape(-1)
        shape = (info.numel, info.nbytes // info.numel)
        elements = np.memmap(self.path, dtype=np.uint8, mode="r", offset=info.start, shape=shape)
        return torch.from_numpy(np.array(elements[::stride])).view(self._torch_dtype(info)).reshape(-1)

    def _torch_dtype(self, info: TensorInfo) -> torch.dtype:
        if info.dtype not in TORCH_DTYPES:
            raise UnlearningError(
                f"{self.path}: tensor {info.name!r} has dtype {info.dtype}, which can be copied but not computed with. "
                "Use the 16- or 32-bit version of the model."
            )
        return TORCH_DTYPES[info.dtype]


class SafetensorsCheckpoint:
    """
    The weights of a model folder, single-file or sharded, in the precedence transformers uses.

    Args:
        folder (`str` or `Path`): A local folder, as `save_pretrained` writes it.

    Its `shards` map file names to `SafetensorsFile`s; `index` is the content of the index file, `None` if unsharded.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UnlearningError(f"The model folder {self.folder} does not exist. Check the path.")
        self.index: dict[str, Any] | None = None
        names = [WEIGHTS_FILE]
        if not (self.folder / WEIGHTS_FILE).is_file():
            self.index = self._read_index()
            names = sorted(set(self.index["weight_map"].values()))
        self.shards = {name: SafetensorsFile(self.folder / name) for name in names}
        self._shard_of = {tensor: shard for shard in self.shards.values() for tensor in shard.tensors}
        if self.index:
            self._check_index()

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            found = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in self.folder.glob(pattern)]
            reason = f"only {sorted(found)[0]} and the like, which can run code when read" if found else "no weights"
            raise UnlearningError(
                f"{self.folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: {reason}. Load the model with "
                "transformers and save it again with `save_pretrained`, which writes safetensors."
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            shards = set(index["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnlearningError(f"{path} is not a checkpoint index ({error!r}). Download it again.") from error
        if any(Path(name).name != name for name in shards):
            raise UnlearningError(f"{path} names a shard outside of its folder. Download it again.")
        return index

    def _check_index(self) -> None:
        for tensor, shard in self.index["weight_map"].items():
            if tensor not in self.shards[shard].tensors:
                raise UnlearningError(
                    f"{self.folder / INDEX_FILE} lists {tensor!r} in {shard}, which does not hold it. "
                    "Index and shards are from different checkpoints: download or save them again."
                )

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._shard_of)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of tensor `name`."""
        return self._shard_of[name].tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, read from disk at every call."""
        return self._shard_of[name].read(name)

    def read_bytes(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`, for copying, whatever its dtype."""
        return self._shard_of[name].read_bytes(name)

    def read_sample(self, name: str, stride: int) -> torch.Tensor:
        """Every `stride`-th element of tensor `name`, flattened."""
        return self._shard_of[name].read_sample(name, stride)


def find_tensor(name: str, available: Container[str]) -> str | None:
    """
    The name under which a checkpoint holds the live tensor `name`, or `None`.

    Some checkpoints were saved from the model without its head (`h.0...` for the live `transformer.h.0...`), so the
    leading component may be missing.
    """
    if name in available:
        return name
    stripped = name.partition(".")[2]
    return stripped if stripped in available else None


def resolve_folder(
    name_or_path: str | Path, revision: str | None, allow_patterns: Iterable[str], ignore_patterns: Iterable[str] = ()
) -> Path:
    """A local folder as it is, or a snapshot of a Hub repository restricted to the given file patterns."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(name_or_path).startswith((".", "~")) or str(name_or_path).count("/") > 1:
        raise UnlearningError(f"The folder {name_or_path} does not exist. Check the path.")
    try:
        snapshot = snapshot_download(
            str(name_or_path),
            revision=revision,
            allow_patterns=list(allow_patterns),
            ignore_patterns=list(ignore_patterns),
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UnlearningError(
            f"{name_or_path!r} is neither a local folder nor a Hub repository that could be downloaded ({error}). "
            "Check the name, the revision, your token and the connection."
        ) from error
    return Path(snapshot)


def resolve_model(name_or_path: str | Path, revision: str | None = None) -> Path:
    """
    The local folder of a model: the folder itself, or a download of the Hub repository without other weight formats.

    Args:
        name_or_path (`str` or `Path`): Local folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
    """
    return resolve_folder(name_or_path, revision, MODEL_PATTERNS, IGNORED_PATTERNS)


def write_shard(
    path: str | Path,
    entries: Iterable[tuple[str, str, tuple[int, ...], int]],
    read: Callable[[str], torch.Tensor | np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """
    Write a safetensors file with one tensor in memory at a time.

    Args:
        path (`str` or `Path`): The file to write.
        entries (iterable of `tuple`): Name, safetensors dtype code, shape and number of bytes of each tensor.
        read (`Callable`): Called once per name, in the order of the file; returns the tensor, or its raw bytes.
        metadata (`dict`, *optional*): Header metadata; transformers requires `{"format": "pt"}`, the default.
    """
    # Widest elements first, as safetensors does: every tensor then starts at a multiple of its element size.
    ordered = sorted(entries, key=lambda entry: (-(entry[3] // max(1, prod(entry[2]))), entry[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, dtype, shape, nbytes in ordered:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with Path(path).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, _, _, nbytes in ordered:
            content = read(name)
            if isinstance(content, torch.Tensor):
                content = content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            if content.nbytes != nbytes:
                raise RuntimeError(f"{name!r} has {content.nbytes} bytes where {nbytes} were announced")
            file.write(content.data)
            del content
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_folder(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    Fill a folder that appears under its final name only once it is complete.

    Args:
        final (`str` or `Path`): The folder to create.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace a folder that is not empty. The old one stays until the new one is complete.

    Yields:
        `Path`: A temporary sibling folder, moved on success and removed on any exception.
    """
    final = Path(final).expanduser().resolve()
    if final.exists() and not final.is_dir():
        raise UnlearningError(f"The output {final} is a file. Name a folder.")
    if final.is_dir() and any(final.iterdir()):
        if not overwrite:
            raise UnlearningError(f"The output folder {final} is not empty. Name another, or pass `overwrite=True`.")
        if Path.cwd().resolve().is_relative_to(final):
            raise UnlearningError(f"The output folder {final} holds the working directory. Name another.")
    suffix = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = final.with_name(f".{final.name}.tmp-{suffix}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _replace_folder(temporary, final, final.with_name(f".{final.name}.old-{suffix}"))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_folder(temporary: Path, final: Path, aside: Path) -> None:
    """Move `temporary` to `final`; what was there is set aside first, put back on failure and removed on success."""
    replaces = final.exists()
    if replaces:
        final.rename(aside)
    try:
        temporary.rename(final)
    except BaseException:
        if replaces:
            aside.rename(final)
        raise
    if replaces:
        shutil.rmtree(aside)
