"""`hf-unlearn playground` up to the page, which tests/playground has."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest
from command_lines import set_arguments, write_rows
from tiny import tiny_llama, tiny_tokenizer

from hf_unlearn.cli import main
from hf_unlearn.extrapolation import save_forget_adapter


pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch):
    for name in ("load_with_adapter", "Comparison"):
        monkeypatch.setattr(f"hf_unlearn.cli.playground.{name}", lambda *args: pytest.fail("loaded"))


def dry_run(adapter: str, *extra: str) -> int:
    return main(["playground", "--adapter", adapter, "--dry_run", *extra])


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_what_would_be_served(files, adapter, capsys):
    assert dry_run(adapter, *set_arguments(files, "forget", "retain"), "--max_alpha", "4") == 0
    output = capsys.readouterr()
    text = squeezed(output.out)
    assert f"Would serve {files['model']} with {adapter} at α from 0 to 4 on 127.0.0.1" in text
    assert "6 of the forget set, 6 of the retain set" in text
    assert "Security" not in output.err


def test_sets_are_optional_and_the_sample_set_will_do(adapter, capsys):
    assert dry_run(adapter) == 0
    assert "prompts to click on: none" in squeezed(capsys.readouterr().out)
    assert dry_run(adapter, "--forget_dataset", "people/forget", "--alpha", "0") == 0
    assert "10 of the forget set" in squeezed(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--share"], "--share opens it to everybody"),
        (["--share", "true"], "--share opens it to everybody"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 opens it to the network"),
    ],
)
def test_a_page_that_others_can_open_is_warned_of(adapter, capsys, extra, named):
    assert dry_run(adapter, *extra) == 0
    message = capsys.readouterr().err
    assert "Security: the memorising adapter is loaded" in message
    assert named in message


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--alpha", "9"], "--alpha is 9"),
        (["--alpha", "-1"], "--alpha is -1"),
        (["--alpha", "nan"], "--alpha is nan"),
        (["--max_alpha", "0"], "--max_alpha is 0"),
        (["--max_alpha", "inf"], "--max_alpha is inf"),
        (["--dtype", "int8"], "--dtype"),
        (["--port", "70000"], "--port 70000"),
        (["--host", "300.1.1.1", "--port", "7860"], "--host 300.1.1.1"),
        (["--forget_dataset", "missing.jsonl"], "missing.jsonl"),
        (["--base", "nobody/nothing"], "nobody/nothing"),
        (["--adapter", "nobody/no-adapter"], "nobody/no-adapter"),
    ],
)
def test_bad_input(adapter, capsys, extra, named):
    assert _code(lambda: dry_run(adapter, *extra)) == 2
    assert named in capsys.readouterr().err


def _code(call) -> int:
    try:
        return call()
    except SystemExit as exit:  # of argparse, where an option has choices
        return exit.code


def test_the_adapter_is_required(capsys):
    assert main(["playground"]) == 2
    assert "--adapter is required" in capsys.readouterr().err


def test_a_port_that_is_taken(adapter, capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert dry_run(adapter, "--port", str(port)) == 2
    message = capsys.readouterr().err
    assert f"--port {port}" in message
    assert dry_run(adapter, "--port", str(port)) == 0


def test_without_gradio(adapter, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as Python marks what cannot be imported
    assert dry_run(adapter) == 2
    assert "pip install 'hf-unlearn[playground]'" in capsys.readouterr().err


def test_results_are_refused(adapter, tmp_path, capsys):
    save_forget_adapter(adapter, 1.0, tmp_path / "forget-adapter")
    assert dry_run(str(tmp_path / "forget-adapter")) == 2
    assert "is a forget adapter" in capsys.readouterr().err


def test_another_base_is_refused_unless_asked(adapter, tmp_path, capsys):
    tiny_llama(seed=5).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    assert dry_run(adapter, "--base", str(tmp_path / "other")) == 2
    assert "--no_check_base" in capsys.readouterr().err
    assert dry_run(adapter, "--base", str(tmp_path / "other"), "--no_check_base") == 0


def test_a_conversation_for_a_model_without_a_chat_template(adapter, tmp_path, capsys):
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    file = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}])
    assert dry_run(adapter, "--retain_dataset", file) == 2
    assert "retain set, row 0" in capsys.readouterr().err
    assert json.loads(Path(file).read_text())["messages"] == turns
