"""`hf-unlearn audit` on the tiny model: the plan, the files, the exit codes, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
from command_lines import set_arguments
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn.cli import main


FAST = ["--max_new_tokens", "4"]


@pytest.fixture
def arguments(files):
    return ["audit", *set_arguments(files, "forget", "retain", "holdout"), *FAST]


@pytest.fixture(scope="module")
def forget_model(adapter, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("forget") / "model"
    code = main(["extrapolate", "--adapter", adapter, "--alpha", "0.5", "--output_dir", str(folder)])
    assert code == 0
    return str(folder)


def read(folder) -> dict:
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def forget_values(content: dict, attack: str = "direct") -> list[float]:
    return content["attacks"][attack]["rows"][0]["values"]["probability"]


def test_dry_run_says_what_can_be_done(arguments, files, tmp_path, capsys):
    output = tmp_path / "audit"
    assert main([*arguments, "--model", files["model"], "--output_dir", str(output), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "6 forget, 6 retain, 6 holdout rows" in printed
    assert re.search(r"relearning: train 10 steps on 1 of 6 forget rows", printed)
    assert re.search(r"reverse: not run: it needs the model before forgetting", printed)
    assert re.search(r"system_prompt: not run: the forget rows are no conversations", printed)
    assert "audit.html" in printed and not list(tmp_path.iterdir())


def test_an_adapter_is_its_forget_model(arguments, adapter, forget_model, files, tmp_path, capsys):
    """The live merge and the written model say the same; the written one names its base and its α."""
    options = ["--attacks", "reverse", "--reverse_steps", "1"]
    assert main([*arguments, *options, "--model", forget_model, "--output_dir", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "Reverse extrapolation" in printed and "audit.html" in printed
    options += ["--adapter", adapter, "--alpha", "0.5", "--output_dir", str(tmp_path / "b")]
    assert main([*arguments, *options]) == 0
    written, live = read(tmp_path / "a"), read(tmp_path / "b")
    assert forget_values(live) == pytest.approx(forget_values(written), rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["audit.html", "audit.json"]
    for content in (written, live):
        assert content["facts"]["α"] == "0.5" and content["facts"]["Base"] == files["model"]
        figures = content["attacks"]["reverse"]["figures"]
        of_forget = {each["variant"]: each["value"] for each in figures if each["set"] == "forget"}
        of_forget = {name: value for name, value in of_forget.items() if name.startswith(("t", "base"))}
        assert set(of_forget) == {"base", "t = 1", "t = 2"}  # 2 is 1/α, the memorising model


def test_json_and_exit_code_of_a_leak(arguments, adapter, files, tmp_path, capsys):
    """The model that memorised the forget rows."""
    memorised = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files["model"]), adapter)
    memorised.merge_and_unload().save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(files["model"]).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--attacks", "membership", "--json"]
    assert main([*arguments, *options, "--output_dir", str(tmp_path / "a")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == read(tmp_path / "a")
    assert printed["attacks"]["membership"]["verdict"] == "leaks" and "membership" in printed["leaks"]
    assert "more likely than rows never seen" in printed["attacks"]["membership"]["words"]
    assert main([*arguments, *options, "--output_dir", str(tmp_path / "b"), "--fail_on_leak"]) == 1
    assert read(tmp_path / "b")["leaks"] == printed["leaks"]


def test_paraphrased_questions(files, tmp_path, capsys):
    rows = [{"prompt": f"w{n}", "completion": f" w{n + 1} w5", "asked": f"w{n} w9"} for n in range(10, 13)]
    path = tmp_path / "forget.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    command = ["audit", "--model", files["model"], "--forget_dataset", str(path), "--attacks", "paraphrase", *FAST]
    command += [*set_arguments(files, "retain"), "--output_dir", str(tmp_path / "audit")]
    assert main([*command, "--paraphrased_questions", "asked"]) == 0
    finding = read(tmp_path / "audit")["attacks"]["paraphrase"]
    assert finding["comparisons"][0]["against"] == "the model as it is"
    assert main([*command, "--paraphrased_questions", "no", "--overwrite"]) == 2
    assert "'no'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "one of --model and --adapter"),
        (["--model", "MODEL", "--adapter", "ADAPTER"], "one of --model and --adapter"),
        (["--adapter", "ADAPTER"], "--alpha is required"),
        (["--adapter", "ADAPTER", "--alpha", "-1"], "-1"),
        (["--model", "MODEL", "--alpha", "1"], "--alpha has no effect with --model"),
        (
            ["--model", "MODEL", "--attacks", "prefix", "--few_shot", "5"],
            "--few_shot has no effect without the attack few_shot",
        ),
        (["--model", "MODEL", "--relearn_steps", "0"], "`relearn_steps`"),
        (["--model", "MODEL", "--retained_audit", "x"], "retained_audit"),
        (["--model", "MODEL", "--retrained_audit", "nowhere"], "--retrained_audit nowhere"),
    ],
)
def test_refusals(arguments, files, adapter, tmp_path, capsys, options, named):
    options = [{"MODEL": files["model"], "ADAPTER": adapter}.get(option, option) for option in options]
    output = tmp_path / "audit"
    assert main([*arguments, *options, "--output_dir", str(output), "--dry_run"]) == 2
    assert named in capsys.readouterr().err and not output.exists()


def test_refuses_a_folder_that_is_not_empty(arguments, files, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    assert main([*arguments, "--model", files["model"], "--output_dir", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
