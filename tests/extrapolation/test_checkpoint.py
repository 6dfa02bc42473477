"""Reading and writing safetensors files, checked against the safetensors library."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from extrapolation_models import build_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import (
    SafetensorsCheckpoint,
    SafetensorsFile,
    atomic_folder,
    find_tensor,
    read_provenance,
    resolve_model,
    write_provenance,
    write_shard,
)
from hf_unlearn.extrapolation import checkpoint as checkpoint_module


TENSORS = {
    "a.f64": torch.randn(3, dtype=torch.float64),
    "b.u8": torch.arange(5, dtype=torch.uint8),
    "c.f32": torch.randn(2, 3),
    "d.bool": torch.tensor([True, False, True]),
    "e.bf16": torch.randn(7).bfloat16(),
    "f.i64": torch.tensor(-3),
    "g.f16": torch.randn(1, 1, 2).half(),
    "h.fp8": torch.randn(9).to(torch.float8_e4m3fn),
    "i.fp8": torch.randn(9).to(torch.float8_e5m2),
    "j.i16": torch.arange(3, dtype=torch.int16),
    "k.empty": torch.empty(0, 2),
    'ü\n"': torch.ones(1),
}


def assert_same(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else [] for t in (actual, wanted)]
    assert as_bytes[0] == as_bytes[1]


def test_reads_what_safetensors_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.tensors.keys() == TENSORS.keys() and file.metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert_same(file.read(name), tensor)
        assert_same(file.read_sample(name, 2), tensor.reshape(-1)[::2].clone(memory_format=torch.contiguous_format))
        assert file.read_bytes(name).nbytes == tensor.nbytes
        pieces = list(file.read_byte_pieces(name, 3))
        assert b"".join(pieces) == file.read_bytes(name).tobytes() and all(0 < len(piece) <= 3 for piece in pieces)
    assert_same(file.read_elements("c.f32", 1, 4), TENSORS["c.f32"].reshape(-1)[1:5])
    assert_same(file.read_elements("e.bf16", 5, 2), TENSORS["e.bf16"][5:])


def test_safetensors_reads_what_is_written(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    infos = SafetensorsFile(tmp_path / "x.safetensors").tensors.values()
    entries = [(info.name, info.dtype, info.shape, info.nbytes) for info in infos]
    write_shard(tmp_path / "y.safetensors", entries, TENSORS.__getitem__)
    with safe_open(tmp_path / "y.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert_same(file.get_tensor(name), tensor)
    content = (tmp_path / "y.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert_same(load_file(tmp_path / "y.safetensors")["e.bf16"], TENSORS["e.bf16"])


@pytest.mark.parametrize("size", [1, 2, 100])
def test_pieces_make_up_the_same_file(tmp_path, size):
    save_file(TENSORS, tmp_path / "x.safetensors")
    infos = SafetensorsFile(tmp_path / "x.safetensors").tensors.values()
    entries = [(info.name, info.dtype, info.shape, info.nbytes) for info in infos]
    write_shard(tmp_path / "y.safetensors", entries, TENSORS.__getitem__)
    write_shard(tmp_path / "z.safetensors", entries, lambda name: TENSORS[name].reshape(-1).split(size))
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "z.safetensors").read_bytes()


def test_tensors_begin_with_a_page_of_the_file(tmp_path):
    for count in (1, 60):
        entries = [(f"x{number}", "F32", (2,), 8) for number in range(count)]
        write_shard(tmp_path / "x.safetensors", entries, lambda name: torch.zeros(2))
        starts = [info.start for info in SafetensorsFile(tmp_path / "x.safetensors").tensors.values()]
        assert min(starts) % 4096 == 0
        assert load_file(tmp_path / "x.safetensors").keys() == {entry[0] for entry in entries}


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(2), torch.zeros(1)], []])
def test_wrong_number_of_bytes_is_an_error(tmp_path, content):
    with pytest.raises(RuntimeError, match="'x' has (12|0) bytes where 8 were announced"):
        write_shard(tmp_path / "x.safetensors", [("x", "F32", (2,), 8)], lambda name: content)


def test_a_tensor_is_written_before_the_next_is_made(tmp_path):
    path, size = tmp_path / "x.safetensors", 32 << 20
    made: list[str] = []

    def read(name: str) -> torch.Tensor:
        assert path.stat().st_size >= len(made) * size
        made.append(name)
        return torch.zeros(size // 4)

    write_shard(path, [(name, "F32", (size // 4,), size) for name in "abc"], read)
    assert made == ["a", "b", "c"]


def test_one_piece_is_written_while_the_next_is_made(tmp_path):
    path, size, count = tmp_path / "x.safetensors", 8 << 20, 12

    def pieces(name: str) -> Iterator[torch.Tensor]:
        for number in range(count):
            assert path.stat().st_size >= (number - 1) * size
            yield torch.zeros(size // 4)

    write_shard(path, [("x", "F32", (count * size // 4,), count * size)], pieces)
    assert path.stat().st_size > count * size


def test_dtypes_unknown_to_torch_are_copied(tmp_path):
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    file = SafetensorsFile(path)
    write_shard(tmp_path / "y.safetensors", [("x", "F6_E2M3", (4,), 3)], file.read_bytes)
    assert SafetensorsFile(tmp_path / "y.safetensors").read_bytes("x").tobytes() == b"abc"
    with pytest.raises(UnlearningError, match="F6_E2M3"):
        file.read("x")


def test_single_file_goes_before_the_index(tmp_path):
    build_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(SafetensorsCheckpoint(tmp_path).shards) > 1
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert SafetensorsCheckpoint(tmp_path).names() == ["x"]


def test_broken_checkpoints(tmp_path):
    with pytest.raises(UnlearningError, match="does not exist"):
        SafetensorsCheckpoint(tmp_path / "absent")
    with pytest.raises(UnlearningError, match="no weights"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnlearningError, match=r"pytorch_model\.bin.*save_pretrained"):
        SafetensorsCheckpoint(tmp_path)


def test_broken_shards(tmp_path):
    build_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = tmp_path / index["weight_map"]["model.norm.weight"]
    content = shard.read_bytes()
    for broken, message in [(content[:-1], "truncated"), (b"version https://git-lfs", "LFS"), (b"", "safetensors")]:
        shard.write_bytes(broken)
        with pytest.raises(UnlearningError, match=message):
            SafetensorsCheckpoint(tmp_path)
    shard.unlink()
    with pytest.raises(UnlearningError, match=f"{shard.name} does not exist"):
        SafetensorsCheckpoint(tmp_path)
    shard.write_bytes(content)
    index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], "extra": shard.name}}))
    with pytest.raises(UnlearningError, match="lists 'extra'"):
        SafetensorsCheckpoint(tmp_path)
    for damaged in ("{", "{}", '{"weight_map": {"x": "../x.safetensors"}}'):
        index_file.write_text(damaged)
        with pytest.raises(UnlearningError, match=r"index"):
            SafetensorsCheckpoint(tmp_path)


def test_find_tensor():
    assert find_tensor("a.b.weight", {"a.b.weight", "b.weight"}) == "a.b.weight"
    assert find_tensor("a.b.weight", {"b.weight"}) == "b.weight"
    assert find_tensor("a.b.weight", {"weight"}) is None


def test_resolve_model(tmp_path, monkeypatch):
    assert resolve_model(tmp_path) == tmp_path
    for absent in (tmp_path / "absent", "./absent", "a/b/c"):
        with pytest.raises(UnlearningError, match="does not exist"):
            resolve_model(absent)
    calls = {}

    def download(name, **options):
        calls.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    assert resolve_model("org/model", revision="v1") == tmp_path
    assert calls["name"] == "org/model" and calls["revision"] == "v1"
    assert "*.safetensors" in calls["allow_patterns"] and "*.bin" not in calls["allow_patterns"]

    def fail(name, **options):
        raise OSError("offline")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", fail)
    with pytest.raises(UnlearningError, match=r"org/model.*offline"):
        resolve_model("org/model")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_atomic_folder_on_failure(tmp_path, error, existing):
    final = tmp_path / "deep" / "out"
    if existing:
        final.mkdir(parents=True)
        (final / "old").write_text("old")
    with pytest.raises(error), atomic_folder(final, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert not (final / "new").exists()
        raise error
    assert [path.name for path in (tmp_path / "deep").iterdir()] == (["out"] if existing else [])
    assert not existing or (final / "old").read_text() == "old"


def test_atomic_folder_on_success(tmp_path, monkeypatch):
    final = tmp_path / "out"
    with atomic_folder(final) as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".out.tmp-")
        (folder / "new").write_text("1")
    with pytest.raises(UnlearningError, match="not empty"), atomic_folder(final):
        pass
    with atomic_folder(final, overwrite=True) as folder:
        (folder / "newer").write_text("2")
    assert [path.name for path in final.iterdir()] == ["newer"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnlearningError, match="is a file"), atomic_folder(tmp_path / "file", overwrite=True):
        pass
    monkeypatch.chdir(final)
    with pytest.raises(UnlearningError, match="working directory"), atomic_folder(tmp_path, overwrite=True):
        pass


def test_failed_move_restores_the_old_folder(tmp_path, monkeypatch):
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    original = os.rename

    def rename(self, target):
        if ".tmp-" in self.name:
            raise OSError("no")
        original(self, target)

    monkeypatch.setattr(type(final), "rename", rename)
    with pytest.raises(OSError, match="no"), atomic_folder(final, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (final / "old").read_text() == "old"


def test_leftovers_of_dead_processes_of_this_host_are_removed(tmp_path, caplog):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, dead, alive = platform.node(), ended.pid, os.getpid()
    removed = [f".out.tmp-{host}-{dead}-00000000", f".out.old-{host}-{dead}-00000000"]
    kept = [
        f".out.tmp-{host}-{alive}-00000000",
        f".out.old-{host}-{alive}-00000000",
        f".out.tmp-other-{host}-{dead}-00000000",
        f".out.old-other-{host}-{dead}-00000000",
        f".out.tmp-{host}-{dead}-mine",
        f".out2.tmp-{host}-{dead}-00000000",
        ".out.cache",
    ]
    for name in [*removed, *kept, "out"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "out"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2 and all("other-" in warning and "Delete it" in warning for warning in warnings)


def test_a_folder_set_aside_by_a_dead_process_returns(tmp_path, caplog):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    suffix = f"{platform.node()}-{ended.pid}-0123abcd"
    for kind in ("old", "tmp"):
        (tmp_path / f".out.{kind}-{suffix}").mkdir()
        (tmp_path / f".out.{kind}-{suffix}" / kind).write_text(kind)
    with pytest.raises(UnlearningError, match="not empty"), atomic_folder(tmp_path / "out"):
        pass
    assert "the old folder is back in its place" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_provenance_file(tmp_path):
    assert read_provenance(tmp_path) == {}
    write_provenance(tmp_path, {"α": 1})
    assert read_provenance(tmp_path) == {"α": 1}
    for damaged, message in [("{", "not valid JSON"), ("[]", "not a JSON object")]:
        (tmp_path / "unlearning.json").write_text(damaged)
        with pytest.raises(UnlearningError, match=message):
            read_provenance(tmp_path)
