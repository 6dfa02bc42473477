"""Commands killed at any moment: nothing half-written has a final name, and a later run gives what an undisturbed one does."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_lines import set_arguments, train_arguments, write_rows
from interpreters import Interpreters, Process
from safetensors.torch import load_file
from tiny import tiny_rows


KILLED = -9
KILL_IN_CALL = Path(__file__).with_name("kill_in_call.py")
TRAIN = ["--max_steps", "6", "--save_steps", "1", "--save_total_limit", "2", "--learning_rate", "1e-3", "--use_cpu"]
SWEEP = ["--alphas", "0.5", "1", "--refinements", "1", "--no_generation"]
MOMENTS = {"train": 10, "extrapolate": 10, "sweep": 10}  # at random
CALLS = [  # in which training kills itself: half of a file is written, or files are moved
    ("peft.peft_model", "safe_save_file", 3),  # in the third checkpoint
    ("peft.peft_model", "safe_save_file", 7),  # at the end
    ("torch", "save", 5),
    ("transformers.trainer_callback:TrainerState", "save_to_json", 4),
    ("pathlib:Path", "rename", 2),  # a checkpoint gets its name
    ("pathlib:Path", "replace", 2),  # the adapter gets its name, file by file
    ("pathlib:Path", "replace", 8),  # the weights, which come last
]


def command(interpreters: Interpreters, arguments: list[str], *kill_at: object) -> Process:
    """Start a command line, which kills itself in a call of a function if that is given."""
    killing = [KILL_IN_CALL, *kill_at] if kill_at else ["-m", "hf_unlearn.cli"]
    return interpreters.start(*killing, *arguments)


@pytest.fixture(scope="module")
def undisturbed(interpreters, tiny_model_dir, tmp_path_factory) -> SimpleNamespace:
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
        process = command(interpreters, arguments(folder / name))
        codes[name] = process.wait()
        durations[name] = time.monotonic() - begin
        assert codes[name] in ((0, 1) if name == "sweep" else (0,)), process.output  # 1: the rule is missed
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


def run_again(interpreters: Interpreters, arguments: list[str], output: Path) -> int:
    """As a user would: the same command, and what its message says."""
    process = command(interpreters, arguments)
    code, said = process.wait(), process.output
    if code == 2:
        resume = any(output.glob("checkpoint-*"))
        assert ("--resume" in said and arguments[0] == "train") or "--overwrite" in said, said
        process = command(interpreters, [*arguments, "--resume" if resume else "--overwrite"])
        code = process.wait()
    assert code in (0, 1), process.output
    return code


def check_equal(name: str, output: Path, undisturbed: SimpleNamespace) -> None:
    """Bit for bit what the undisturbed command gave."""
    expected = undisturbed.folder / name
    files = {"train": "adapter_model.safetensors", "extrapolate": "model.safetensors", "sweep": "choice.json"}
    assert (output / files[name]).read_bytes() == (expected / files[name]).read_bytes()
    visible = {path.name for path in output.iterdir()} - {path.name for path in expected.iterdir()}
    assert not visible
    assert {path.name for path in output.parent.iterdir()} <= {"out", "out.cache"}  # no lock, nothing temporary


@pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name, count in MOMENTS.items() for seed in range(count)], ids=str
)
def test_killed_at_a_random_moment(name, seed, interpreters, undisturbed, tmp_path):
    count = MOMENTS[name]
    share = (seed + random.Random(f"{name} {seed}").random()) / count  # one in each part of its time
    arguments = undisturbed.commands[name](tmp_path / "out")
    process = command(interpreters, arguments)
    time.sleep(share * undisturbed.durations[name])
    process.send_signal(signal.SIGKILL)  # where it has ended, its process id is kept until it is waited for
    assert process.wait() in (KILLED, undisturbed.codes[name]), process.output
    check_whole(tmp_path)
    assert run_again(interpreters, arguments, tmp_path / "out") == undisturbed.codes[name]
    check_equal(name, tmp_path / "out", undisturbed)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_killed_while_it_saves(call, interpreters, undisturbed, tmp_path):
    arguments = undisturbed.commands["train"](tmp_path / "out")
    process = command(interpreters, arguments, *call)
    assert process.wait() == KILLED, process.output
    check_whole(tmp_path)
    run_again(interpreters, arguments, tmp_path / "out")
    check_equal("train", tmp_path / "out", undisturbed)
