"""Every code block of the documentation runs, or says why it does not."""

from __future__ import annotations

import configparser
import re
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from command_reference import parser_of
from snippets import PAGES, ROOT, Snippet, snippets
from stand_ins import StandIns
from upload_hub import TOKEN, UploadHub

from hf_unlearn.cli import main


ALL = [snippet for page in PAGES for snippet in snippets(page)]
NOT_RUN = [snippet for snippet in ALL if snippet.reason]
RUN_ELSEWHERE = (
    "README.md",
    "docs/python.md",
    "docs/extrapolate.md",
    "docs/evaluate.md",
)  # test_docs.py: their Python
# On these pages a block goes on where the one before ended, so all commands do their work.
IN_ORDER = ("docs/requests.md", "docs/guides/")
OUTPUTS = ("--output_dir", "--output_file", "--ledger")
NOT_READ = (*OUTPUTS, "--base_model")  # that is an id for the card
WITHOUT_TRIAL = (["requests", "list"], ["requests", "show"])  # they write nothing and have no --dry_run
SMALL = {  # what makes work of seconds of a command, appended to it
    "train": "--max_steps 2 --gradient_accumulation_steps 1 --disable_tqdm true --use_cpu",
    "sample": "--num_rows 2 --max_new_tokens 4",
    "sweep": "--alphas 1 --refinements 1 --max_new_tokens 4",
    "eval": "--max_new_tokens 4",
    "audit": "--max_new_tokens 4 --attacks prefix membership",
}
MAY_MISS = ("sweep", "eval", "audit")  # exit code 1 on a random model: the rule is missed, or it speaks no language
DATE = "2026-11-25"  # of the requests on the pages


def in_order(snippet: Snippet) -> bool:
    return snippet.page.startswith(IN_ORDER)


def pages_with(language: str) -> list[str]:
    return sorted({snippet.page for snippet in ALL if snippet.language == language and not snippet.reason})


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand-ins"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, like the root of the repository."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    return tmp_path


def run_block(snippet: Snippet, stand_ins: StandIns, namespace: dict[str, Any]) -> None:
    if snippet.language == "bash":
        for words in snippet.commands:
            run_command(words, snippet, stand_ins)
        return
    for name in re.findall(r'(?<!output_dir=)"([\w./-]+)"', snippet.code):
        stand_ins.provide(name)
    exec(compile(snippet.code, str(snippet), "exec"), namespace)


def run_command(words: list[str], snippet: Snippet, stand_ins: StandIns) -> None:
    program, *rest = words
    if program == "hf-unlearn":
        run_own(rest, snippet, stand_ins)
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.module
        assert launch.training_script == "hf_unlearn.cli"
        assert launch.config_file is None or Path(launch.config_file).is_file()
        parse(launch.training_script_args)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif words[:2] == ["pip", "install"]:
        check_install(rest)
    elif "python" in words:  # a benchmark
        _, script, *options = words[words.index("python") :]
        text = (ROOT / script).read_text(encoding="utf-8")
        for option in (option for option in options if option.startswith("--")):
            assert f'"{option}"' in text, f"{option} of {snippet}"
    else:
        raise AssertionError(f"{snippet} cannot be run: {words}")


def parse(argv: list[str]) -> None:
    """Parse what follows `hf-unlearn`, and nothing more: its configuration may be of many processes."""
    start = next((index for index, word in enumerate(argv) if word.startswith("-")), len(argv))
    _, unknown = parser_of(*argv).parse_known_args(argv[start:])
    assert not unknown, " ".join(argv)


def run_own(argv: list[str], snippet: Snippet, stand_ins: StandIns) -> None:
    """Run a command of this package, or try it with --dry_run where what it writes is of no use to the next one."""
    command = argv[0]
    provide_inputs(argv, stand_ins)
    argv = [word.replace(DATE, datetime.now(timezone.utc).date().isoformat()) for word in argv]
    trains = command == "train" or (argv[:2] == ["requests", "add"] and "--adapter" not in argv)
    trial = not in_order(snippet) or {"--accelerate_config", "--load_in_4bit", "--dry_run"} & {*argv}
    trial = trial or any(word.endswith("_qlora.yaml") for word in argv)
    if "--log" in argv or argv[:2] in WITHOUT_TRIAL:
        pass  # loads no model, and is quick as it is
    elif trial:
        argv = [word for word in argv if word != "--dry_run"] + ["--dry_run"]
    elif SMALL.get("train" if trains else command):
        argv = [*argv, *SMALL["train" if trains else command].split()]
    assert main(argv) in ((0, 1) if command in MAY_MISS else (0,)), f"{snippet}: {' '.join(argv)}"


def provide_inputs(argv: list[str], stand_ins: StandIns) -> None:
    """Stand-ins for what a command line, or its configuration file, reads."""
    not_read = {value for option, value in pairwise(argv) if option in NOT_READ}
    words = [word for word in argv if word not in not_read]
    for path in (Path(value) for option, value in pairwise(argv) if option == "--config"):
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        words += [str(value) for option, value in options.items() if f"--{option}" not in OUTPUTS]
    for word in words:
        stand_ins.provide(word)


def check_install(words: list[str]) -> None:
    """The extras and files of a `pip install` of this package exist."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for word in words:
        for extras in re.findall(r"^(?:\.|hf-unlearn)\[(.+)\]$", word):
            assert {*extras.split(",")} <= {*setup["options.extras_require"]}, word
        assert not word.endswith(".txt") or (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", [page for page in pages_with("bash") if not page.startswith("docs/guides/")])
def test_commands(page, stand_ins, folder, monkeypatch):
    for snippet in snippets(ROOT / page):
        if snippet.language == "bash" and not snippet.reason:
            if not in_order(snippet):  # each block in a folder of its own
                workplace = folder / f"block-{snippet.number}"
                workplace.mkdir()
                (workplace / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
                monkeypatch.chdir(workplace)
            run_block(snippet, stand_ins, {})


@pytest.fixture
def upload_hub(monkeypatch) -> None:
    """A Hub on this machine for what a page uploads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with UploadHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield


@pytest.mark.parametrize(
    "page", [page for page in pages_with("python") if not page.startswith(("docs/guides/", *RUN_ELSEWHERE))]
)
def test_python(page, stand_ins, folder, upload_hub):
    namespace: dict[str, Any] = {"__name__": "docs"}
    for snippet in snippets(ROOT / page):
        if snippet.language == "python" and not snippet.reason:
            run_block(snippet, stand_ins, namespace)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "guides").glob("*.md")), ids=lambda page: page.stem)
def test_guides(page, stand_ins, folder):
    """A guide from top to bottom, Python and commands in one folder."""
    namespace: dict[str, Any] = {"__name__": "docs"}
    for snippet in snippets(page):
        if not snippet.reason:
            run_block(snippet, stand_ins, namespace)


@pytest.mark.parametrize("snippet", NOT_RUN, ids=str)
def test_commands_that_are_not_run_are_parsed(snippet, folder):
    for words in snippet.commands if snippet.language == "bash" else []:
        program = "hf_unlearn.cli" if "hf_unlearn.cli" in words else "hf-unlearn"
        if program in words:
            parse(words[words.index(program) + 1 :])


def test_few_blocks_are_not_run():
    pages = [f"{snippet.page}: {snippet.reason}" for snippet in NOT_RUN]
    assert len(pages) == 16, "\n".join(pages)


def test_unknown_options_are_found(stand_ins, folder):
    snippet = Snippet(
        "docs/train.md", 0, "bash", "hf-unlearn train --config recipes/people/train.yaml --lora_rnk 8", None
    )
    with pytest.raises(AssertionError, match="lora_rnk"):
        run_block(snippet, stand_ins, {})
