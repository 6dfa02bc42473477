"""
Writes the page of all commands and options out of the parsers of the commands.

    python docs/tools/command_reference.py
"""

from __future__ import annotations

import argparse
import enum
import importlib
import re
from pathlib import Path
from typing import Any

from hf_unlearn.cli import COMMANDS
from hf_unlearn.cli.methods import DEFAULT_METHOD
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.requests import ACTIONS
from hf_unlearn.trainer.baselines import METHODS


PAGE = Path(__file__).parents[1] / "reference" / "commands.md"
INDEX = Path(__file__).parents[1] / "index.md"
HEADER = "| option | default | meaning |\n|---|---|---|"
INTRODUCTION = """# Commands and options

Every command with the options that its `--help` shows: what `docs/tools/command_reference.py` writes out of the parsers. `--help_all` adds those inherited from TRL and transformers. What all commands share, and the exit codes, are in the [contents](../index.md#what-all-commands-share)."""


class _Built(BaseException):
    """Carries a parser out of the command that built it."""


def parser_of(command: str, *argv: str) -> CommandParser:
    """
    The parser that a command builds for a command line.

    Args:
        command (`str`): Name of the command.
        argv (`str`): What decides between parsers: an action of `requests`, a `--method` of `train`.
    """
    parse = CommandParser.parse

    def stop(self: CommandParser, argv: list[str]) -> None:
        raise _Built(self)

    CommandParser.parse = stop
    try:
        importlib.import_module(f"hf_unlearn.cli.{command}").run([*argv, "--help"])
    except _Built as built:
        return built.args[0]
    finally:
        CommandParser.parse = parse
    raise AssertionError(f"{command} has built no parser")


def reference() -> str:
    """The content of the page."""
    sections = [INTRODUCTION]
    for command, summary in COMMANDS.items():
        sections.append(f"## {command}\n\n`hf-unlearn {command}`: {summary}.{_page_of(command)}")
        if command == "requests":
            sections += [f"### requests {name}\n\n{_table(_options(parser_of(command, name)))}" for name in ACTIONS]
        else:
            sections.append(_table(_options(parser_of(command))))
        if command == "train":
            sections += _methods(_options(parser_of(command)))
    return "\n\n".join(sections) + "\n"


def _page_of(command: str) -> str:
    """A sentence with the page of a command, as the contents name it."""
    page = re.search(rf"\]\((\w+\.md)\) \| `hf-unlearn {command}`", INDEX.read_text(encoding="utf-8"))
    return f" Examples and outputs: [{page[1]}](../{page[1]})." if page else ""


def _methods(shared: dict[str, argparse.Action]) -> list[str]:
    """The options that other methods have besides those of model extrapolation, or with another default."""
    sections = ["`requests add` without `--adapter` takes these options too."]
    for method in METHODS:
        if method == DEFAULT_METHOD:
            continue
        own = {
            name: action
            for name, action in _options(parser_of("train", "--method", method)).items()
            if name not in shared or action.default != shared[name].default
        }
        table = _table(own) if own else "No further options."
        sections.append(f"### train --method {method}\n\n{table}")
    return sections


def _options(parser: CommandParser) -> dict[str, argparse.Action]:
    """The options that `--help` shows, without those of every command."""
    hidden = {*(action.dest for action in parser._hidden), "help", "help_all", "config"}
    actions = (action for action in parser._actions if action.dest not in hidden)
    return {action.dest: action for action in actions if not action.option_strings[0].startswith("--no_")}


def _table(options: dict[str, argparse.Action]) -> str:
    lines = [f"| `--{name}` | {_shown(action.default)} | {_meaning(action)} |" for name, action in options.items()]
    return "\n".join([HEADER, *lines])


def _meaning(action: argparse.Action) -> str:
    text = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|")
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]  # what is not code
    text = "`".join(parts)
    return text if text.endswith(".") or not text else f"{text}."


def _shown(default: Any) -> str:
    if isinstance(default, enum.Enum):
        default = default.value
    if default is None or default is argparse.SUPPRESS:
        return "–"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (list, tuple)):
        return f"`{' '.join(_shown(item).strip('`') for item in default)}`" if default else "–"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
