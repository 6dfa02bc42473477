"""
Safetensors checkpoints, read and written one tensor, or a piece of one, at a time.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, byte range) and the
tensors' bytes. Headers are parsed once; no tensor is read before it is asked for, and none is kept.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hf_unlearn.errors import UnlearningError, parse_json
from hf_unlearn.extrapolation.background import BackgroundWriter
from hf_unlearn.extrapolation.leftovers import clear_leftovers, temporary_sibling


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SMALL_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
MODEL_PATTERNS = ("*.safetensors", *SMALL_PATTERNS)
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
# Of the page cache.
PAGE_BYTES = 4096
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


def parse_header(file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and tensors of a safetensors file of `size` bytes, of which only the header is read."""
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("its header is longer than the file")
    header = parse_json(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        (first, last), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
        numbers = (first, last - first, *shape)
        if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"the entry of {name!r} in its header is none")
        if dtype in TORCH_DTYPES and last - first != prod(shape) * TORCH_DTYPES[dtype].itemsize:
            raise ValueError(f"{name!r} has another number of bytes than its shape and dtype need")
        tensors[name] = TensorInfo(name, dtype, shape, 8 + length + first, last - first)
    return metadata, tensors


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
        size = self.path.stat().st_size
        try:
            with self.path.open("rb") as file:
                self.metadata, self.tensors = parse_header(file, size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnlearningError(
                f"{self.path} is not a safetensors file ({error}); it may be a Git LFS pointer or cut off. "
                "Download or save it again."
            ) from error
        end = max((info.start + info.nbytes for info in self.tensors.values()), default=0)
        if end > size:
            raise UnlearningError(
                f"{self.path} is truncated: its header promises {end} bytes, it has {size}. Download or save it again."
            )

    def read_bytes(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`, as a new `uint8` array."""
        return self._read(name, 0, self.tensors[name].nbytes)

    def read_byte_pieces(self, name: str, nbytes: int) -> Iterator[np.ndarray]:
        """The bytes of tensor `name`, at most `nbytes` at a time."""
        total = self.tensors[name].nbytes
        return (self._read(name, first, min(nbytes, total - first)) for first in range(0, total, nbytes))

    def read_elements(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` elements of tensor `name` from the flat index `first` on."""
        info = self.tensors[name]
        dtype = self._torch_dtype(info)
        return torch.from_numpy(self._read(name, first * dtype.itemsize, count * dtype.itemsize)).view(dtype)

    def _read(self, name: str, first: int, nbytes: int) -> np.ndarray:
        return np.fromfile(self.path, dtype=np.uint8, count=nbytes, offset=self.tensors[name].start + first)

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, read from disk at every call."""
        info = self.tensors[name]
        dtype = self._torch_dtype(info)
        if not info.numel:
            return torch.empty(info.shape, dtype=dtype)
        return torch.from_numpy(self.read_bytes(name)).view(dtype).reshape(info.shape)

    def read_sample(self, name: str, stride: int) -> torch.Tensor:
        """Every `stride`-th element of tensor `name`, flattened; only these bytes are read."""
        info = self.tensors[name]
        if not info.numel:
            return self.read(name).reshape(-1)
        dtype = self._torch_dtype(info)
        content = bytearray()
        with self.path.open("rb", buffering=0) as file:
            for index in range(0, info.numel, stride):
                file.seek(info.start + index * dtype.itemsize)
                content += file.read(dtype.itemsize)
        return torch.frombuffer(content, dtype=dtype)

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
        remote (`dict`, *optional*): File name -> what stands for a file that is not in the folder yet.

    Its `shards` map file names to `SafetensorsFile`s; `index` is the content of the index file, `None` if unsharded.
    """

    def __init__(self, folder: str | Path, remote: Mapping[str, Any] | None = None) -> None:
        remote = remote or {}
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UnlearningError(f"The model folder {self.folder} does not exist. Check the path.")
        self.index: dict[str, Any] | None = None
        names = [WEIGHTS_FILE]
        if WEIGHTS_FILE not in remote and not (self.folder / WEIGHTS_FILE).is_file():
            self.index = self._read_index()
            names = sorted(set(self.index["weight_map"].values()))
        self.shards = {name: remote[name] if name in remote else SafetensorsFile(self.folder / name) for name in names}
        self._shard_of = {tensor: name for name, shard in self.shards.items() for tensor in shard.tensors}
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
            index = parse_json(path.read_text(encoding="utf-8"))
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
        return self.shard_of(name).tensors[name]

    def shard_of(self, name: str) -> SafetensorsFile:
        """The file that holds tensor `name`."""
        return self.shards[self._shard_of[name]]

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, read from disk at every call."""
        return self.shard_of(name).read(name)

    def read_sample(self, name: str, stride: int) -> torch.Tensor:
        """Every `stride`-th element of tensor `name`, flattened."""
        return self.shard_of(name).read_sample(name, stride)


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
    read: Callable[[str], torch.Tensor | np.ndarray | Iterable[torch.Tensor | np.ndarray]],
    metadata: dict[str, str] | None = None,
) -> None:
    """
    Write a safetensors file with one tensor, or one piece of it, in memory at a time.

    Args:
        path (`str` or `Path`): The file to write.
        entries (iterable of `tuple`): Name, safetensors dtype code, shape and number of bytes of each tensor.
        read (`Callable`): Called once per name, in the order of the file; returns the tensor, or its raw bytes, or
            an iterator over successive pieces of either.
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
    encoded += b" " * (-(8 + len(encoded)) % PAGE_BYTES)  # bytes in step with the file's pages are copied faster
    with Path(path).open("wb") as file, BackgroundWriter(file) as writer:
        writer.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, _, _, nbytes in ordered:
            written = 0
            writer.wait()
            for piece in _as_bytes(read(name)):  # the next piece is computed while this one is written
                written += piece.nbytes
                writer.write(piece)
                del piece
            if written != nbytes:
                raise RuntimeError(f"{name!r} has {written} bytes where {nbytes} were announced")


def _as_bytes(content: torch.Tensor | np.ndarray | Iterable[torch.Tensor | np.ndarray]) -> Iterator[np.ndarray]:
    """The raw bytes of a tensor, of bytes, or of pieces of either."""
    for piece in [content] if isinstance(content, (torch.Tensor, np.ndarray)) else content:
        if isinstance(piece, torch.Tensor):
            piece = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield piece


@contextmanager
def atomic_folder(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    Fill a folder that appears under its final name only once it is complete.

    Args:
        final (`str` or `Path`): The folder to create.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace a folder that is not empty. The old one stays until the new one is complete.

    Yields:
        `Path`: A temporary sibling folder, moved on success and removed on any exception. One that a killed process
            left is removed by the next call with the same `final`.
    """
    final = Path(final).expanduser().resolve()
    clear_leftovers(final)
    if final.exists() and not final.is_dir():
        raise UnlearningError(f"The output {final} is a file. Name a folder.")
    if final.is_dir() and any(final.iterdir()):
        if not overwrite:
            raise UnlearningError(f"The output folder {final} is not empty. Name another, or pass `overwrite=True`.")
        if Path.cwd().resolve().is_relative_to(final):
            raise UnlearningError(f"The output folder {final} holds the working directory. Name another.")
    temporary = temporary_sibling(final, "tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _replace_folder(temporary, final, temporary_sibling(final, "old"))
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UnlearningError(
                f"The disk became full while {final} was written; nothing was left there. Make room, or name a folder "
                "on another disk."
            ) from error
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
        shutil.rmtree(aside, ignore_errors=True)
