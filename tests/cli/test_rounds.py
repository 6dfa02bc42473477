"""`hf-unlearn train --rounds`."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from command_lines import set_arguments, train_arguments
from safetensors.torch import load_file

from hf_unlearn.cli import main


WEIGHTS = "adapter_model.safetensors"


def equal(one: Path, other: Path) -> bool:
    tensors, others = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_one_round_is_an_ordinary_training(files, adapter, tmp_path):
    assert main(train_arguments(files, tmp_path / "run", "--rounds", "1")) == 0
    assert equal(tmp_path / "run", Path(adapter))
    names = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "run", Path(adapter))]
    assert names[0] == names[1]


def test_the_first_round_is_a_training_held_where_its_step_ends_and_the_sum_can_be_swept(files, tmp_path, capsys):
    run, held = tmp_path / "run", tmp_path / "held"
    assert main(train_arguments(files, held, "--retain_kl_scale", "-0.25")) == 0
    capsys.readouterr()
    assert main(train_arguments(files, run, "--rounds", "2", "--round_alpha", "0.25")) == 0
    printed = capsys.readouterr().out
    assert "Round 1 of 2" in printed
    assert "Round 2 of 2" in printed
    assert "--alphas 0.25 0.5 0.75 1 " in printed
    assert equal(run / "round-1", held)
    assert json.loads((run / "unlearning.json").read_text())["training"]["retain_kl_scale"] == -0.25
    assert json.loads((run / "unlearning.json").read_text())["operator"]["round_alpha"] == 0.25
    assert len(load_file(run / WEIGHTS)) == len(load_file(run / "round-1" / WEIGHTS))
    sweep = ["sweep", "--adapter", str(run), *set_arguments(files, "forget", "retain"), "--alphas", "0.5", "1"]
    assert main([*sweep, "--output_dir", str(tmp_path / "sweep")]) in (0, 1)  # 1: the rule is not met
    assert (tmp_path / "sweep").is_dir()


def test_dry_run(files, tmp_path, capsys):
    assert main(train_arguments(files, tmp_path / "run", "--dry_run", "--rounds", "4")) == 0
    printed = capsys.readouterr().out
    assert "10 (1 an epoch) a round, 40 in all" in printed
    assert re.search(r"rounds: +4, each a step of α = 0.5 ", printed)
    assert "at most 0.5 MB in" in printed  # twice 65,856 parameters of 4 bytes
    assert main(train_arguments(files, tmp_path / "run", "--dry_run", "--rounds", "2")) == 0
    assert "at most 0.3 MB in" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rounds", "0"], "rounds=0"),
        (["--rounds", "2", "--round_alpha", "-1"], "round_alpha=-1"),
        (["--round_alpha", "1"], "--round_alpha has no effect with --rounds 1"),
        (["--rounds", "2", "--method", "npo"], "--rounds has no effect with --method npo"),
        (["--rounds", "2", "--load_in_4bit"], "quantised base"),
        (["--rounds", "2", "--load_in_8bit", "--dry_run"], "quantised base"),
        (["--rounds", "2", "--resume"], "no round to go on from"),
    ],
)
def test_refused(files, tmp_path, capsys, options, named):
    assert main(train_arguments(files, tmp_path / "run", *options)) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_earlier_run_is_not_replaced_unasked(files, adapter, tmp_path, capsys):
    assert main(train_arguments(files, adapter, "--rounds", "2")) == 2
    assert "holds the adapter of an earlier run" in capsys.readouterr().err
    (tmp_path / "run" / "round-1").mkdir(parents=True)
    for options in ([], ["--rounds", "2"]):
        assert main(train_arguments(files, tmp_path / "run", *options)) == 2
        assert "holds rounds of an earlier run" in capsys.readouterr().err


def test_ctrl_c_in_the_second_round_leaves_a_state_that_resumes_to_the_same_adapter(interpreters, files, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    options = ["--num_train_epochs", "50", "--learning_rate", "1e-3", "--rounds", "2"]
    assert main(train_arguments(files, straight, *options)) == 0

    process = interpreters.start("-m", "hf_unlearn.cli", *train_arguments(files, stopped, *options))
    process.wait_until(lambda: "'epoch': '5'" in process.output.partition("Round 2 of 2")[2])
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, process.output
    assert "--resume" in process.output
    assert not (stopped / WEIGHTS).exists()
    assert list(stopped.glob("round-2/checkpoint-*"))

    assert main(train_arguments(files, stopped, *options, "--resume")) == 0
    assert equal(straight, stopped)
