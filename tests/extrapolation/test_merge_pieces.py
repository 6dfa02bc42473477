"""The merge works in pieces: the same bits as from whole tensors, little memory, and nothing left by a full disk."""

from __future__ import annotations

import errno
import math
import platform
import shutil
import subprocess
import sys
import weakref

import peft
import pytest
import torch
from extrapolation_models import LLAMA_TARGETS, build_llama, save_pair
from safetensors.torch import load_file, save_file

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import LoraAdapter, SafetensorsCheckpoint, SafetensorsFile, extrapolate
from hf_unlearn.extrapolation import arithmetic as arithmetic_module
from hf_unlearn.extrapolation import merge as merge_module
from hf_unlearn.extrapolation.arithmetic import RealisedError, row_pieces


ALPHA = 1.7


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_few_pieces_of_the_base_in_memory_at_a_time(tmp_path, monkeypatch, dtype):
    base, adapter, _ = save_pair(build_llama(), tmp_path, shard="40KB")
    monkeypatch.setattr(arithmetic_module, "PIECE_ROWS", 8)
    monkeypatch.setattr(merge_module, "COPY_BYTES", 8 * 64 * 4)
    for module in (arithmetic_module, merge_module):
        monkeypatch.setattr(module, "PIECE_ELEMENTS", 8 * 64)
    alive: list[weakref.ref] = []
    read: dict[str, int] = {}

    def counting(self, name, first, nbytes):
        data = original(self, name, first, nbytes)
        if self.path.parent == base:
            assert nbytes <= 8 * 96 * 4
            assert len([ref for ref in alive if ref() is not None]) <= 2, "earlier pieces of the base are still held"
            alive.append(weakref.ref(data))
            read[name] = read.get(name, 0) + nbytes
        return data

    original = SafetensorsFile._read
    monkeypatch.setattr(SafetensorsFile, "_read", counting)
    extrapolate(base, adapter, ALPHA, tmp_path / "out", dtype=dtype, progress=False)
    checkpoint = SafetensorsCheckpoint(base)
    assert read == {name: checkpoint.info(name).nbytes for name in checkpoint.names()}


@pytest.mark.parametrize("pieces", [1 << 10, 1 << 12])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_pieces_give_the_same_bits_as_whole_tensors(tmp_path, monkeypatch, pieces, dtype, transposed):
    shapes = {"q_proj": (333, 64), "v_proj": (64, 333), "down_proj": (200, 160), "other": (777,)}
    torch.manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    config = peft.LoraConfig(r=16, lora_alpha=24, target_modules=LLAMA_TARGETS, fan_in_fan_out=transposed)
    config.save_pretrained(tmp_path / "adapter")
    factors = {}
    for name in LLAMA_TARGETS:
        rows, columns = shapes[name][::-1] if transposed else shapes[name]
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(16, columns)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 16)
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(weights, tmp_path / "base" / "model.safetensors")

    for module in (arithmetic_module, merge_module):
        monkeypatch.setattr(module, "PIECE_ELEMENTS", pieces)
    report = extrapolate(tmp_path / "base", tmp_path / "adapter", ALPHA, tmp_path / "out", dtype=dtype, progress=False)
    result = load_file(tmp_path / "out" / "model.safetensors")
    adapter = LoraAdapter.load(tmp_path / "adapter")
    target = torch.bfloat16 if dtype else torch.float32
    squares = []
    for name in LLAMA_TARGETS:
        weight = weights[f"{name}.weight"]
        wanted = adapter.delta(name) * -ALPHA
        merged = (weight + wanted).to(target)
        assert torch.equal(result[f"{name}.weight"], merged), name
        error = (merged.float() - weight) - wanted
        squares.append((error.double().square().sum(), wanted.double().square().sum()))
    assert torch.equal(result["other.weight"], weights["other.weight"].to(target))
    errors, norms = (torch.stack(values) for values in zip(*squares, strict=True))
    assert report.realised_error == pytest.approx((errors.sum() / norms.sum()).sqrt().item(), rel=1e-7)
    worst = int((errors / norms).argmax())
    assert report.worst_tensor == f"{LLAMA_TARGETS[worst]}.weight"
    assert report.worst_error == pytest.approx((errors / norms).sqrt().max().item(), rel=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_threads_write_and_record_the_same_as_one(tmp_path, monkeypatch, dtype):
    base, adapter, _ = save_pair(build_llama(), tmp_path)
    monkeypatch.setattr(arithmetic_module, "PIECE_ROWS", 8)
    monkeypatch.setattr(arithmetic_module, "PIECE_ELEMENTS", 8 * 64)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(merge_module, "compute_threads", lambda threads=threads: threads)
        output = tmp_path / str(threads)
        report = extrapolate(base, adapter, ALPHA, output, dtype=dtype, progress=False)
        content = (output / "model.safetensors").read_bytes()
        results.append((content, report.realised_error, report.worst_tensor, report.worst_error))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("rows", "columns", "pieces"),
    [
        (1, 5, [(0, 1)]),
        (64, 1 << 20, [(0, 64)]),
        (127, 1 << 20, [(0, 127)]),
        (128, 1 << 20, [(0, 64), (64, 128)]),
        (1000, 1024, [(0, 256), (256, 512), (512, 768), (768, 1000)]),
        (800, 1000, [(0, 256), (256, 512), (512, 800)]),
        (1 << 18, 1, [(0, 1 << 18)]),
    ],
)
def test_row_pieces(rows, columns, pieces):
    assert row_pieces(rows, columns) == pieces


def test_realised_error_of_pieces():
    errors = RealisedError()
    errors.add("a", torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]), changed=True)
    errors.add("a", torch.zeros(1), torch.tensor([12.0]), changed=False)
    errors.add("b", torch.zeros(2), torch.zeros(2), changed=False)
    errors.add("c", torch.tensor([0.0, 5.0]), torch.tensor([0.0, 4.0]), changed=True)
    assert errors.changed_tensors == 2
    assert errors.worst_tensor == "a" and errors.worst_relative == pytest.approx(math.sqrt(160 / 169))
    assert errors.relative == pytest.approx(math.sqrt((160 + 1) / (169 + 16)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_base_is_refused(tmp_path, value):
    base, adapter, _ = save_pair(build_llama(), tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][31, 5] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnlearningError, match=r"layers.1.self_attn.v_proj.weight' would hold NaN or infinite"):
        extrapolate(base, adapter, ALPHA, tmp_path / "out", check_base=False, progress=False)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_leaves_nothing(small_disk, tmp_path, monkeypatch):
    base, adapter, _ = save_pair(build_llama(), tmp_path, shard="40KB")
    assert sum(path.stat().st_size for path in base.iterdir()) > 256 << 10
    with pytest.raises(UnlearningError, match=r"needs .* has .* free"):
        extrapolate(base, adapter, ALPHA, small_disk / "out", progress=False)
    # as when something else fills the disk during the merge
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 0, 1 << 30))
    with pytest.raises(UnlearningError, match=r"disk became full while .*/small/out was written"):
        extrapolate(base, adapter, ALPHA, small_disk / "out", progress=False)
    assert not list(small_disk.iterdir())


def test_what_a_killed_run_left_is_removed_before_the_space_is_checked(small_disk, tmp_path):
    base, adapter, _ = save_pair(build_llama(), tmp_path, shard="40KB")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = small_disk / f".out.tmp-{platform.node()}-{ended.pid}-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(200 << 10))
    extrapolate(base, adapter, ALPHA, small_disk / "out", dtype="bfloat16", progress=False)
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_full_disk_in_the_middle(tmp_path, llama_pair, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merge_module, "write_shard", fail)
    with pytest.raises(UnlearningError, match=r"disk became full while .*/out was written; nothing was left"):
        extrapolate(*llama_pair, ALPHA, tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
