"""
A base on the Hub, checked before its weights are downloaded: of a weights file that is not in the cache only the
header is fetched at first, and the file itself when its turn comes.
"""

from __future__ import annotations

import io
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff, tqdm

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.checkpoint import (
    IGNORED_PATTERNS,
    SMALL_PATTERNS,
    TORCH_DTYPES,
    SafetensorsCheckpoint,
    SafetensorsFile,
    TensorInfo,
    find_tensor,
    parse_header,
    resolve_folder,
)
from hf_unlearn.extrapolation.fingerprint import verify_fingerprint_files


logger = logging.getLogger(__name__)

# Enough for almost every header, so that one request does.
HEADER_BYTES = 100_000
# Tensors of the fingerprint up to this size, such as norms and biases, are fetched and verified before any download.
SMALL_TENSOR_BYTES = 1 << 18
# Among them the base of all errors of the client library, which differs between versions of huggingface_hub.
HUB_ERRORS = (OSError, ValueError, *HfHubHTTPError.__bases__)


class HubShard:
    """
    A weights file of a Hub repository that is not in the cache.

    Args:
        repository (`str`): Hub id.
        commit (`str`): Commit hash.
        name (`str`): Name of the file.
        size (`int`): Its size in bytes.
    """

    def __init__(self, repository: str, commit: str, name: str, size: int) -> None:
        self.repository = repository
        self.commit = commit
        self.name = name
        self.size = size

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file."""
        return self._header[0]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> place of each tensor."""
        return self._header[1]

    @cached_property
    def _header(self) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        content = self._fetch(0, min(self.size, HEADER_BYTES))
        end = 8 + int.from_bytes(content[:8], "little")
        if len(content) < end <= self.size:
            content = self._fetch(0, end)
        try:
            return parse_header(io.BytesIO(content), self.size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnlearningError(f"{self} is not a safetensors file ({error}). Pass another base.") from error

    def read_sample(self, name: str, stride: int) -> torch.Tensor:
        """Every `stride`-th element of tensor `name`, flattened; the whole tensor is fetched."""
        info = self.tensors[name]
        content = np.frombuffer(self._fetch(info.start, info.nbytes), dtype=np.uint8).reshape(info.numel, -1)
        return torch.from_numpy(content[::stride].copy()).view(TORCH_DTYPES[info.dtype]).reshape(-1)

    def _fetch(self, first: int, nbytes: int) -> bytes:
        """Some bytes of the file, by a range request."""
        url = hf_hub_url(self.repository, self.name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{first + nbytes - 1}"}
        try:
            with http_stream_backoff("GET", url, headers=headers) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:
                    raise OSError("the server does not answer requests for a part of a file")
                return response.read()
        except HUB_ERRORS as error:
            raise UnlearningError(
                f"The header of {self} could not be read ({error}). Check the connection, or download the model first "
                f"(`hf download {self.repository}`)."
            ) from error

    def download(self, folder: Path | None, progress: bool) -> SafetensorsFile:
        """
        Download the file.

        Args:
            folder (`Path`, *optional*): Where to; into the cache if not given.
            progress (`bool`): Whether to show a progress bar.
        """
        try:
            path = hf_hub_download(
                self.repository,
                self.name,
                revision=self.commit,
                local_dir=folder,
                tqdm_class=None if progress else _SilentTqdm,
            )
        except HUB_ERRORS as error:
            raise UnlearningError(
                f"{self} could not be downloaded ({error}). Check the connection and the disk space, and run the "
                "command again: files that are in the cache are not downloaded twice."
            ) from error
        file = SafetensorsFile(path)
        if file.tensors != self.tensors:
            raise UnlearningError(f"{path} is not the file that the Hub has announced. Delete it and run again.")
        return file

    def __str__(self) -> str:
        return f"{self.repository}/{self.name}"


class _SilentTqdm(tqdm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


def open_base(name_or_path: str | Path, revision: str | None = None) -> SafetensorsCheckpoint:
    """
    The weights of a local folder or of a Hub repository, whose weights files are not downloaded: those that are not in
    the cache are `HubShard`s.

    Args:
        name_or_path (`str` or `Path`): Local folder or Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
    """
    folder = resolve_folder(name_or_path, revision, SMALL_PATTERNS, IGNORED_PATTERNS)
    if Path(name_or_path).expanduser().is_dir():
        return SafetensorsCheckpoint(folder)
    repository, commit = str(name_or_path), folder.name
    try:
        files = snapshot_download(
            repository,
            revision=commit,
            allow_patterns="*.safetensors",
            ignore_patterns=list(IGNORED_PATTERNS),
            dry_run=True,
        )
        for file in files:
            if file.is_cached:  # perhaps by another revision, and not yet known by this one
                hf_hub_download(repository, file.filename, revision=commit)
    except HUB_ERRORS as error:
        logger.warning(f"The Hub cannot be reached, only the cache is used: {error}")
        return SafetensorsCheckpoint(folder)
    remote = {
        file.filename: HubShard(repository, commit, file.filename, file.file_size)
        for file in files
        if not file.is_cached
    }
    return SafetensorsCheckpoint(folder, remote)


def verify_base(fingerprint: dict[str, Any], checkpoint: SafetensorsCheckpoint, shard: str | None = None) -> None:
    """
    Raise where a part of a fingerprint that can be read now does not have the recorded content.

    Args:
        fingerprint (`dict`): The recorded fingerprint.
        checkpoint (`SafetensorsCheckpoint`): The base.
        shard (`str`, *optional*): The file to verify. If not given, all files that are here, and the small tensors of
            the others.
    """
    recorded = fingerprint.get("tensors")
    found = {name: find_tensor(name, checkpoint) for name in recorded} if isinstance(recorded, dict) else {}
    if not any(found.values()):
        verify_fingerprint_files(fingerprint, checkpoint)  # raises

    def readable(tensor: str) -> bool:
        file, info = checkpoint.shard_of(tensor), checkpoint.info(tensor)
        if shard is not None:
            return file is checkpoint.shards[shard]
        small = 0 < info.nbytes <= SMALL_TENSOR_BYTES and info.dtype in TORCH_DTYPES
        return isinstance(file, SafetensorsFile) or small

    part = {name: recorded[name] for name, tensor in found.items() if tensor is not None and readable(tensor)}
    if part:
        verify_fingerprint_files({**fingerprint, "tensors": part}, checkpoint)
