"""Full disks, folders that cannot be written and no network: a sentence, and what was there before is whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
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
    subprocess.run(["umount", str(folder)], capture_output=True)


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


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network(offline, files, tmp_path):
    """The Hub cannot be asked, or a port answers nothing: refused within seconds, before any training."""
    code = """
import os, sys, time
sys.argv[1:] = sys.argv[1:]
from hf_unlearn.cli import main
import hf_unlearn.cli.train, hf_unlearn.cli.extrapolate
begin = time.monotonic()
codes = [main(["extrapolate", "--adapter", "me/adapter", "--alpha", "2", "--output_dir", "out"])]
codes.append(main(["train", "--model_name_or_path", "me/model", "--forget_dataset", "people/forget", "--output_dir", "o"]))
codes.append(main(["train", "--model_name_or_path", sys.argv[1], "--forget_dataset", "me/set", "--output_dir", "o"]))
print(codes, time.monotonic() - begin)
"""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", code, files["model"]]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    codes, seconds = result.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    assert codes == "[2, 2, 2]", result.stderr
    assert float(seconds) < 60
    assert "Traceback" not in result.stderr
    for name in ("me/adapter", "me/model", "me/set"):
        assert name in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "o").exists()
    assert time  # the limit is on waiting, not on work
