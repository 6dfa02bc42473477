"""Full disks, folders that cannot be written and no network: a sentence, and what was there before is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import train_arguments
from safetensors.torch import load_file

from hf_unlearn.cli import main


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a disk of so many bytes, with options such as `ro`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.mark.parametrize("size", [260, 390, 900], ids=lambda size: f"{size}k")
def test_a_full_disk_leaves_the_checkpoints_before_whole(size, mounted, files, tmp_path, capsys):
    """Full in the adapter of the first checkpoint, in its state, and in a later one."""
    folder = mounted(f"size={size}k")
    options = ["--max_steps", "3", "--save_steps", "1", "--use_cpu"]
    assert main(train_arguments(files, folder / "run", *options)) == 1
    said = capsys.readouterr().err
    assert "The disk became full while" in said
    assert f"{folder / 'run'}" in said
    assert "--resume" in said
    assert "Traceback" not in said
    visible = [path for path in folder.glob("run/**/*") if path.is_file()]
    assert all(".saving" not in str(path) for path in visible)
    for path in visible:
        if path.suffix == ".safetensors":
            load_file(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
    checkpoints = list(folder.glob("run/checkpoint-*"))
    assert bool(checkpoints) == (size == 900)
    subprocess.run(["mount", "-o", "remount,size=9m", str(folder)], check=True)
    resume = ["--resume"] if checkpoints else []
    assert main(train_arguments(files, folder / "run", *options, *resume)) == 0
    assert main(train_arguments(files, tmp_path / "straight", *options)) == 0
    weights = "adapter_model.safetensors"
    assert (folder / "run" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()


@pytest.mark.parametrize("command", ["train", "extrapolate"])
def test_a_disk_that_cannot_be_written_is_named_before_any_work(command, mounted, files, adapter, capsys):
    folder = mounted("ro")
    arguments = ["extrapolate", "--adapter", adapter, "--alpha", "2", "--output_dir", str(folder / "run")]
    assert main(arguments if command == "extrapolate" else train_arguments(files, folder / "run")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"Nothing can be written to {folder / 'run'}: Read-only file system." in said


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    """What it is without a network is in docs/errors.md."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    arguments = ["extrapolate", "--adapter", "me/adapter", "--alpha", "2", "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "'me/adapter' is neither a local folder nor a Hub repository that could be downloaded" in said
    assert "Connection refused" in said
    assert said.endswith("Check the name, the revision, your token and the connection.")
    assert not any(tmp_path.iterdir())
