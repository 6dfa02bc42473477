"""`hf-unlearn completion`: a script by which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass, field

from hf_unlearn.cli import COMMANDS, EXIT_OK
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.errors import UnlearningError


SHELLS = ("bash", "zsh", "fish")

DESCRIPTION = """\
Print a script by which a shell completes commands, options and those values that are names. It is plain text: completing
starts no Python. Print it anew after an upgrade. Nothing is written, so there is no --dry_run."""

EXAMPLE = """\
  source <(hf-unlearn completion bash)                  # this shell; ~/.bashrc keeps a file of it faster
  hf-unlearn completion bash > ~/.local/share/bash-completion/completions/hf-unlearn
  hf-unlearn completion zsh > ~/.hf-unlearn.zsh         # and `source ~/.hf-unlearn.zsh` in ~/.zshrc
  hf-unlearn completion fish > ~/.config/fish/completions/hf-unlearn.fish"""

Options = dict[str, list[str]]  # option: the values it has a choice of, if any

BASH = """\
_hf_unlearn() {
    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" words=""
    local command="${COMP_WORDS[1]}"
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="@COMMANDS@"
    else
        if [ "$command" = requests ]; then
            if [ "$COMP_CWORD" -eq 2 ]; then
                command=""
                words="@ACTIONS@"
            else
                command="requests ${COMP_WORDS[2]}"
            fi
        fi
        case "$command $previous" in
@CHOICES@
            *) case "$command" in
@OPTIONS@
            esac ;;
        esac
    fi
    COMPREPLY=()
    case "$words" in
        --*) case "$current" in -*) ;; *) words="" ;; esac ;;
    esac
    if [ -n "$words" ]; then
        COMPREPLY=( $(compgen -W "$words" -- "$current") )
    fi
}
complete -o default -F _hf_unlearn hf-unlearn
"""
ZSH = (
    "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"
    "autoload -Uz bashcompinit && bashcompinit\n" + BASH
)


@dataclass
class CompletionArguments:
    """
    Options of `hf-unlearn completion`.

    Args:
        shell (`str`): The shell.
    """

    shell: str | None = field(
        default=None,
        metadata={"help": "The shell; it may also follow the command without --shell. Required.", "choices": SHELLS},
    )


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    if argv and not argv[0].startswith("-"):
        argv = ["--shell", *argv]
    (arguments,) = CommandParser("completion", [CompletionArguments], DESCRIPTION, EXAMPLE, json=False).parse(argv)
    if arguments.shell is None:
        raise UnlearningError(f"--shell is required: one of {', '.join(SHELLS)}. See `hf-unlearn completion --help`.")
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell](all_options()), end="")
    return EXIT_OK


def all_options() -> dict[str, Options]:
    """Options of every command and of every action of `requests`; `requests add` has those of `train` too."""
    found = {command: options_of(command) for command in COMMANDS if command != "requests"}
    for action, (_, kind, _, _) in importlib.import_module("hf_unlearn.cli.requests").ACTIONS.items():
        found[f"requests {action}"] = _options(CommandParser("requests", [kind], "", ""))
    return found | {"requests add": found["train"] | found["requests add"]}


def options_of(command: str) -> Options:
    """Options of a command; `train` has those of all its methods."""
    module = importlib.import_module(f"hf_unlearn.cli.{command}")
    kinds = [[getattr(module, f"{command.capitalize()}Arguments")]]
    if command == "train":
        kinds = [[*kinds[0], config, module.LoraModelConfig] for _, config in module.METHODS.values()]
    found: Options = {}
    for each in kinds:
        found |= _options(CommandParser(command, each, "", "", json=command not in ("completion", "playground")))
    return found


def _options(parser: argparse.ArgumentParser) -> Options:
    return {
        option: [str(choice) for choice in action.choices or ()]
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and "-" not in option[2:]
    }


def bash(options: dict[str, Options], template: str = BASH) -> str:
    """The script for bash."""
    choices = [
        f'            "{command} {option}") words="{" ".join(values)}" ;;'
        for command, of_command in options.items()
        for option, values in of_command.items()
        if values
    ]
    words = [
        f'                "{command}") words="{" ".join(sorted(names))}" ;;' for command, names in options.items()
    ]
    actions = [command.split()[1] for command in options if command.startswith("requests ")]
    for name, value in {
        "COMMANDS": " ".join(COMMANDS),
        "ACTIONS": " ".join(actions),
        "CHOICES": "\n".join(choices),
        "OPTIONS": "\n".join(words),
    }.items():
        template = template.replace(f"@{name}@", value)
    return template


def zsh(options: dict[str, Options]) -> str:
    """The script for zsh, which runs that for bash."""
    return bash(options, ZSH)


def fish(options: dict[str, Options]) -> str:
    """The script for fish."""
    lines = ["complete -c hf-unlearn -n __fish_use_subcommand -f"]
    for command, text in COMMANDS.items():
        lines.append(f"complete -c hf-unlearn -n __fish_use_subcommand -a {command} -d {_quoted(text)}")
    actions = [command.split()[1] for command in options if command.startswith("requests ")]
    chosen = f"not __fish_seen_subcommand_from {' '.join(actions)}"
    lines.append(
        f"complete -c hf-unlearn -n '__fish_seen_subcommand_from requests; and {chosen}' -f -a '{' '.join(actions)}'"
    )
    for command, of_command in options.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.split())
        for option, values in sorted(of_command.items()):
            given = f" -x -a '{' '.join(values)}'" if values else ""
            lines.append(f"complete -c hf-unlearn -n '{seen}' -l {option[2:]}{given}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
