"""A base on the Hub, downloaded one weights file at a time from a server on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from extrapolation_models import build_llama, save_pair
from huggingface_hub import constants, hf_hub_download
from local_hub import COMMIT, REPOSITORY, LocalHub
from safetensors.torch import load_file, save_file

from hf_unlearn.cli import main
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import SafetensorsCheckpoint, extrapolate, fingerprint_files, plan_merge
from hf_unlearn.extrapolation import merge as merge_module
from hf_unlearn.extrapolation import remote as remote_module


ALPHA = 1.7
INDEX = "model.safetensors.index.json"


@pytest.fixture
def pair(tmp_path):
    """A base in four files and its adapter; of the tensors, only norms count as small."""
    base, adapter, _ = save_pair(build_llama(), tmp_path / "source", shard="90KB")
    return base, adapter


@pytest.fixture
def hub(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "SMALL_TENSOR_BYTES", 64 * 4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with LocalHub(pair[0]) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        yield hub


def shards_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def large_files(*folders: Path) -> list[Path]:
    """Weights files below the folders, each once however many links there are; also those not complete."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if path.stat().st_size > 20_000]


def merged(hub, pair, tmp_path, name="out", **options):
    return extrapolate(REPOSITORY, pair[1], ALPHA, tmp_path / "result" / name, progress=False, **options)


def assert_result(pair, tmp_path, name="out"):
    """The same files as from the local folder, apart from the record of where the base is from."""
    extrapolate(*pair, ALPHA, tmp_path / "local" / name, progress=False)
    local, result = tmp_path / "local" / name, tmp_path / "result" / name
    assert sorted(path.name for path in local.iterdir()) == sorted(path.name for path in result.iterdir())
    for path in local.iterdir():
        if path.name != "unlearning.json":
            assert path.read_bytes() == (result / path.name).read_bytes(), path.name
    content = [json.loads((folder / "unlearning.json").read_text()) for folder in (local, result)]
    assert content[1]["base"].pop("id") == REPOSITORY and content[1]["base"].pop("revision") == COMMIT
    for record in content:
        record["base"] = record["base"]["fingerprint"]
    assert content[0] == content[1]


def test_shards_are_downloaded_once_and_the_cache_serves_offline(hub, pair, tmp_path, monkeypatch):
    shards = shards_of(pair[0])
    assert len(shards) == 4
    merged(hub, pair, tmp_path)
    assert_result(pair, tmp_path)
    assert hub.downloads == shards
    assert shards_of(tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT) == shards
    hub.downloads.clear(), hub.ranges.clear()
    merged(hub, pair, tmp_path, "again")
    assert not hub.downloads and not hub.ranges
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merged(hub, pair, tmp_path, "offline", delete_cache=True)
    assert_result(pair, tmp_path, "offline")
    assert len(large_files(tmp_path / "cache")) == len(shards)


def test_plan_fetches_headers_and_small_tensors_only(hub, pair, tmp_path):
    plan = plan_merge(REPOSITORY, pair[1], ALPHA, tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in pair[0].glob("*.safetensors")}
    assert plan.downloads == sizes and plan.download_bytes == sum(sizes.values())
    assert not hub.downloads and not large_files(tmp_path / "cache")
    fetched = dict.fromkeys(sizes, 0)
    for name, _ in hub.ranges:
        fetched[name] += 1
    norms = {name: len([tensor for tensor in load_file(pair[0] / name) if "norm" in tensor]) for name in sizes}
    assert sum(norms.values()) == 5
    assert fetched == {name: 1 + norms[name] for name in sizes}
    local = plan_merge(*pair, ALPHA, tmp_path / "out")
    assert plan.files == pytest.approx(local.files, rel=0.2) and plan.adapted == local.adapted
    assert plan.peak_memory == local.peak_memory and not local.downloads


def test_needed_space(hub, pair, tmp_path):
    plan = plan_merge(REPOSITORY, pair[1], ALPHA, tmp_path / "out")
    sizes = sorted(plan.downloads.values())
    assert plan.needed_space() == {tmp_path: plan.total_bytes + sum(sizes)}
    plan = plan_merge(REPOSITORY, pair[1], ALPHA, tmp_path / "out", delete_cache=True)
    assert plan.needed_space() == {tmp_path: plan.total_bytes + sizes[-1]}


def test_needed_space_of_a_cache_on_another_disk(hub, pair, tmp_path, monkeypatch):
    disk = Path("/dev/shm")
    if not disk.is_dir() or os.stat(disk).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second disk")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk / tmp_path.name / "cache"))
    plan = plan_merge(REPOSITORY, pair[1], ALPHA, tmp_path / "out")
    shutil.rmtree(disk / tmp_path.name)
    assert plan.needed_space() == {tmp_path: plan.total_bytes, disk: plan.download_bytes}


def test_disk_space_is_checked_before_the_download(hub, pair, tmp_path, monkeypatch):
    plan = plan_merge(REPOSITORY, pair[1], ALPHA, tmp_path / "out")
    free = plan.total_bytes + plan.download_bytes - 1
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(UnlearningError, match="--delete_cache"):
        merged(hub, pair, tmp_path)
    assert not hub.downloads
    merged(hub, pair, tmp_path, delete_cache=True)


def test_delete_cache_keeps_one_file_at_a_time_and_what_was_there(hub, pair, tmp_path):
    shards = shards_of(pair[0])
    earlier = hf_hub_download(REPOSITORY, shards[2])
    present: list[int] = []
    hub.on_download = lambda name: present.append(
        len([path for path in large_files(tmp_path / "cache", tmp_path / "result") if ".download" in path.parts])
    )
    hub.downloads.clear()
    merged(hub, pair, tmp_path, delete_cache=True)
    assert hub.downloads == [name for name in shards if name != shards[2]]
    assert present == [0] * 3
    assert large_files(tmp_path / "cache") == [Path(earlier).resolve()]
    assert Path(earlier).is_symlink()
    assert_result(pair, tmp_path)


def test_a_file_that_another_revision_has_is_not_downloaded(hub, pair, tmp_path):
    shards = shards_of(pair[0])
    link = Path(hf_hub_download(REPOSITORY, shards[0]))
    other = link.parent.with_name("f" * 40) / shards[0]
    other.parent.mkdir()
    link.rename(other)
    hub.downloads.clear()
    merged(hub, pair, tmp_path, delete_cache=True)
    assert hub.downloads == shards[1:]
    assert other.is_file() and link.is_file()


def change(base: Path, tensor: str) -> str:
    """Change one tensor of a base; returns the file that holds it."""
    file = json.loads((base / INDEX).read_text())["weight_map"][tensor]
    tensors = load_file(base / file)
    tensors[tensor] = tensors[tensor] + 1
    save_file(tensors, base / file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("delete_cache", [False, True])
def test_another_base_is_refused_before_any_download(hub, pair, tmp_path, delete_cache):
    change(pair[0], "model.layers.1.post_attention_layernorm.weight")
    with pytest.raises(UnlearningError, match=r"post_attention_layernorm.weight' has other values"):
        merged(hub, pair, tmp_path, delete_cache=delete_cache)
    assert not hub.downloads and not (tmp_path / "result").exists()
    merged(hub, pair, tmp_path, delete_cache=delete_cache, check_base=False)
    assert len(hub.downloads) == 4


@pytest.mark.parametrize("delete_cache", [False, True])
def test_each_file_is_verified_before_it_is_merged(hub, pair, tmp_path, monkeypatch, delete_cache):
    file = change(pair[0], "model.layers.1.self_attn.k_proj.weight")
    written = []
    original = merge_module.write_shard

    def write_shard(path, *args):
        written.append(path.name)
        original(path, *args)

    monkeypatch.setattr(merge_module, "write_shard", write_shard)
    with pytest.raises(UnlearningError, match=r"layers.1.self_attn.k_proj.weight' has other values"):
        merged(hub, pair, tmp_path, delete_cache=delete_cache)
    assert written == shards_of(pair[0])[:2]
    assert hub.downloads == [*written, file]
    assert not list((tmp_path / "result").iterdir())


def test_a_base_of_another_shape_is_refused_before_any_download(hub, pair, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    file = json.loads((pair[0] / INDEX).read_text())["weight_map"][name]
    save_file({**load_file(pair[0] / file), name: torch.zeros(64, 32)}, pair[0] / file, metadata={"format": "pt"})
    with pytest.raises(UnlearningError, match=r"q_proj.weight' has shape \(64, 32\)"):
        merged(hub, pair, tmp_path)
    assert not hub.downloads


def test_a_base_without_any_tensor_of_the_fingerprint_is_refused(hub, pair, tmp_path):
    record = pair[1] / "unlearning.json"
    content = json.loads(record.read_text())
    content["base"]["fingerprint"]["tensors"] = {"other.weight": "00"}
    record.write_text(json.dumps(content))
    with pytest.raises(UnlearningError, match=r"holds none of the fingerprint's tensors"):
        merged(hub, pair, tmp_path)
    content["base"]["fingerprint"] = {"dtype": "float32", "tensors": []}
    record.write_text(json.dumps(content))
    with pytest.raises(UnlearningError, match="is damaged"):
        merged(hub, pair, tmp_path)
    assert not hub.downloads


@pytest.mark.parametrize("delete_cache", [False, True])
def test_fingerprint_of_a_base_that_the_adapter_has_no_record_of(hub, pair, tmp_path, delete_cache):
    (pair[1] / "unlearning.json").unlink()
    report = merged(hub, pair, tmp_path, delete_cache=delete_cache)
    expected = None if delete_cache else fingerprint_files(SafetensorsCheckpoint(pair[0]))
    assert report.provenance["base"]["fingerprint"] == expected
    assert report.provenance["base"]["revision"] == COMMIT


@pytest.mark.parametrize("both", [False, True], ids=["alone", "beside-an-index"])
def test_one_file(hub, pair, tmp_path, both):
    tensors = {}
    for name in shards_of(pair[0]):
        tensors.update(load_file(pair[0] / name))
        if not both:
            (pair[0] / name).unlink()
    save_file(tensors, pair[0] / "model.safetensors", metadata={"format": "pt"})
    if not both:
        (pair[0] / INDEX).unlink()
    merged(hub, pair, tmp_path)
    assert hub.downloads == ["model.safetensors"]
    assert_result(pair, tmp_path)


def test_a_broken_download_leaves_nothing_and_is_taken_up_again(hub, pair, tmp_path, monkeypatch):
    shards = shards_of(pair[0])
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.broken.add(shards[2])
    with pytest.raises(UnlearningError, match=rf"{REPOSITORY}/{shards[2]} could not be downloaded"):
        merged(hub, pair, tmp_path)
    assert not list((tmp_path / "result").iterdir())
    hub.broken.clear(), hub.downloads.clear()
    merged(hub, pair, tmp_path)
    assert hub.downloads == shards[2:]
    assert_result(pair, tmp_path)


def test_a_server_that_ignores_ranges(hub, pair, tmp_path):
    hub.ignores_range = True
    with pytest.raises(UnlearningError, match=r"header of org/model/.*part of a file.*hf download org/model"):
        merged(hub, pair, tmp_path)


def test_without_the_hub_only_a_whole_cache_will_do(hub, pair, tmp_path, monkeypatch):
    shards = shards_of(pair[0])
    plan_merge(REPOSITORY, pair[1], ALPHA, tmp_path / "out")
    for name in shards[1:]:
        hf_hub_download(REPOSITORY, name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnlearningError, match=f"{shards[0]} does not exist"):
        merged(hub, pair, tmp_path)


def test_file_that_is_no_safetensors(hub, pair, tmp_path):
    shards = shards_of(pair[0])
    (pair[0] / shards[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(UnlearningError, match=f"{REPOSITORY}/{shards[1]} is not a safetensors file"):
        merged(hub, pair, tmp_path)
    assert not hub.downloads


def test_header_longer_than_the_first_request(hub, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "HEADER_BYTES", 100)
    merged(hub, pair, tmp_path)
    assert_result(pair, tmp_path)


def test_dry_run_says_what_is_downloaded(hub, pair, tmp_path, capsys):
    sizes = [path.stat().st_size for path in pair[0].glob("*.safetensors")]
    arguments = ["extrapolate", "--base", REPOSITORY, "--adapter", str(pair[1]), "--alpha", "2", "--dry_run"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    needed = []
    for option in ([], ["--delete_cache"]):
        assert main([*arguments, *option]) == 0
        printed = capsys.readouterr().out
        assert f"Download: {sum(sizes) / 1e6:.1f} MB in {len(sizes)} files." in printed
        needed.append(float(re.search(rf"needed: ([\d.]+) MB in {tmp_path}\.", printed)[1]))
    assert needed[0] - needed[1] == pytest.approx((sum(sizes) - max(sizes)) / 1e6, abs=0.11)
    assert not hub.downloads
