"""Commands killed at any moment: nothing half-written has a final name, and a later run gives what an undisturbed one does."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_lines import set_arguments, train_arguments, write_rows
from forked import ForkServer
from safetensors.torch import load_file
from tiny import tiny_rows


KILLED = -9
TRAIN = ["--max_steps", "6", "--save_steps", "1", "--save_total_limit", "2", "--learning_rate", "1e-3", "--use_cpu"]
SWEEP = ["--alphas", "0.5", "1", "--refinements", "1", "--no_generation"]
MOMENTS = {"train": 4, "extrapolate": 3, "sweep": 3}  # at random
CALLS = [  # in which training kills itself: half of a file is written, or files are moved
    ("peft.peft_model", "safe_save_file", 3),  # in the third checkpoint
    ("peft.peft_model", "safe_save_file", 7),  # at the end
    ("torch", "save", 5),
    ("transformers.trainer_callback:TrainerState", "save_to_json", 4),
    ("pathlib:Path", "rename", 2),  # a checkpoint gets its name
    ("pathlib:Path", "replace", 2),  # the adapter gets its name, file by file
    ("pathlib:Path", "replace", 8),  # the weights, which come last
]


@pytest.fixture(scope="module")
def server():
    with ForkServer() as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server, tiny_model_dir, tmp_path_factory) -> SimpleNamespace:
    """The three commands, what each gives, and how long it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    files = {
        name: write_rows(folder / f"{name}.jsonl", tiny_rows(4, seed))
        for seed, name in enumerate(("forget", "retain"))
    }
    files["model"] = str(tiny_model_dir)
    commands = {
        "train": lambda output: train_arguments(files, output, *TRAIN),
        "extrapolate": lambda output: (
            ["extrapolate", "--adapter", str(folder / "train"), "--alpha", "2", "--output_dir", str(output)]
        ),
        "sweep": lambda output: (
            [
                "sweep",
                "--adapter",
                str(folder / "train"),
                "--output_dir",
                str(output),
                *SWEEP,
                *set_arguments(files, "forget", "retain"),
            ]
        ),
    }
    codes, durations = {}, {}
    for name, arguments in commands.items():
        begin = time.monotonic()
        codes[name], said = server.run(arguments(folder / name), folder / f"{name}.log")
        durations[name] = time.monotonic() - begin
        assert codes[name] in ((0, 1) if name == "sweep" else (0,)), said  # 1: the rule is missed
    return SimpleNamespace(folder=folder, commands=commands, codes=codes, durations=durations)


def check_whole(folder: Path) -> None:
    """Everything under a final name can be read."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        if path.suffix == ".json":
            json.loads(path.read_text())
    adapter = folder / "out" / "adapter_model.safetensors"
    assert not adapter.exists() or (folder / "out" / "unlearning.json").exists()


def run_again(server: ForkServer, arguments: list[str], output: Path) -> int:
    """As a user would: the same command, and what its message says."""
    code, said = server.run(arguments, output.with_name("log"))
    if code == 2:
        resume = any(output.glob("checkpoint-*"))
        assert ("--resume" in said and arguments[0] == "train") or "--overwrite" in said, said
        code, said = server.run([*arguments, "--resume" if resume else "--overwrite"], output.with_name("log"))
    assert code in (0, 1), said
    return code


def check_equal(name: str, output: Path, undisturbed: SimpleNamespace) -> None:
    """Bit for bit what the undisturbed command gave."""
    expected = undisturbed.folder / name
    files = {"train": "adapter_model.safetensors", "extrapolate": "model.safetensors", "sweep": "choice.json"}
    assert (output / files[name]).read_bytes() == (expected / files[name]).read_bytes()
    visible = {path.name for path in output.iterdir()} - {path.name for path in expected.iterdir()}
    assert not visible
    assert {path.name for path in output.parent.iterdir()} <= {"out", "log", "out.cache"}  # no lock, nothing temporary


@pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name, count in MOMENTS.items() for seed in range(count)], ids=str
)
def test_killed_at_a_random_moment(name, seed, server, undisturbed, tmp_path):
    count = MOMENTS[name]
    share = (seed + random.Random(f"{name} {seed}").random()) / count  # one in each part of its time
    arguments = undisturbed.commands[name](tmp_path / "out")
    code = server.kill(arguments, tmp_path / "log", share * undisturbed.durations[name])
    assert code in (KILLED, undisturbed.codes[name]), (tmp_path / "log").read_text()
    check_whole(tmp_path)
    assert run_again(server, arguments, tmp_path / "out") == undisturbed.codes[name]
    check_equal(name, tmp_path / "out", undisturbed)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_killed_while_it_saves(call, server, undisturbed, tmp_path):
    arguments = undisturbed.commands["train"](tmp_path / "out")
    code, said = server.run(arguments, tmp_path / "log", kill_at=call)
    assert code == KILLED, said
    check_whole(tmp_path)
    run_again(server, arguments, tmp_path / "out")
    check_equal("train", tmp_path / "out", undisturbed)
