"""The parser of every command: `TrlParser` with a help that teaches and errors that say what to do."""

from __future__ import annotations

import argparse
import difflib
import warnings
from dataclasses import fields
from typing import Any

import yaml
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from hf_unlearn.cli.terminal import json_output
from hf_unlearn.errors import UnlearningError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class CommandParser(TrlParser):
    """
    `TrlParser` (a YAML `--config`, which flags override) with a help that teaches: an example first, then the options
    that matter. `--help_all` adds every inherited one.

    Args:
        command (`str`): Name of the command.
        dataclass_types (list of types): Dataclasses of its options.
        description (`str`): What the command does.
        example (`str`): A command to copy.
        shown (`set[str]`, *optional*): Inherited options that `--help` shows besides those defined in this package.
        json (`bool`, *optional*, defaults to `True`): Whether the command reports to [`JsonOutput`], and has `--json`.
    """

    def __init__(
        self,
        command: str,
        dataclass_types: list[type],
        description: str,
        example: str,
        shown: set[str] | None = None,
        json: bool = True,
    ) -> None:
        super().__init__(
            dataclass_types,
            prog=f"hf-unlearn {command}",
            description=description,
            epilog=f"example:\n{example}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--config", help="YAML file of options; flags on the command line win.")
        self.add_argument("--help_all", action="store_true", help="Explain every option, also the inherited ones.")
        own = {f.name for kind in dataclass_types for f in _own_fields(kind)} | {"help", "help_all", "config", "json"}
        if json:
            self.add_argument(
                "--json",
                type=string_to_bool,
                nargs="?",
                const=True,
                default=False,
                help="Print one JSON document to stdout and everything else to stderr.",
            )
        self._hidden = [action for action in self._actions if action.dest not in own | (shown or set())]

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """Parse `argv` into the dataclasses; a bad option or configuration file is an [`UnlearningError`]."""
        warnings.filterwarnings("ignore", category=FutureWarning)  # of options that TRL and transformers rename
        if "--help_all" in argv:
            self.print_help()
            raise SystemExit(0)
        if {"-h", "--help"} & set(argv):
            for action in self._hidden:
                action.help = argparse.SUPPRESS
        try:
            parsed = self.parse_args_and_config(argv, return_remaining_strings=True, separate_remaining_strings=True)
        except UnlearningError:
            raise
        except yaml.YAMLError as error:
            raise UnlearningError(f"The --config file is not valid YAML: {error}. Mend it there.") from error
        except FileNotFoundError as error:
            raise UnlearningError(f"--config {error.filename} does not exist. Check the path.") from error
        except IndexError as error:
            raise UnlearningError("--config needs the path of a YAML file behind it.") from error
        except UnicodeDecodeError as error:
            raise UnlearningError("The --config file is not UTF-8 text. Save it as UTF-8.") from error
        except (TypeError, AttributeError, RecursionError) as error:
            raise UnlearningError(
                f"An option has a value of the wrong type: {error}. Compare the --config file with --help_all."
            ) from error
        except (OSError, ValueError) as error:
            raise UnlearningError(f"{str(error).rstrip('.')}.") from error
        *_, of_config, of_command = parsed
        self._refuse_unknown(of_config, "the --config file")
        self._refuse_unknown(of_command, "the command line")
        if getattr(parsed[len(self.dataclass_types)], "json", False):
            json_output.start()
        return parsed[: len(self.dataclass_types)]

    def set_defaults_with_config(self, **options: Any) -> list[str]:
        """
        Take the options of a configuration file as if they were flags: argparse converts and checks text alone, so what
        is not of the option's own type becomes text, and lists and mappings are refused where the option has none.
        """
        classes = [base for kind in self.dataclass_types for base in reversed(kind.__mro__)]
        # As they are written: the parser has replaced the types of the fields by those that it converts to.
        kinds = {name: str(kind) for base in classes for name, kind in vars(base).get("__annotations__", {}).items()}
        for name, value in options.items():
            if value is None or name not in kinds or type(value).__name__ in kinds[name]:
                continue
            if isinstance(value, (list, dict)):
                raise UnlearningError(f"`{name}` in the --config file takes one value, not {value}. Name one.")
            options[name] = str(value)
        return super().set_defaults_with_config(**options)

    def _refuse_unknown(self, remaining: list[str], where: str) -> None:
        """Raise for what no option has taken, and name the option that was probably meant."""
        if not remaining:
            return
        given = remaining[0].split("=")[0]
        options = [option for action in self._actions for option in action.option_strings if option[:2] == "--"]
        if not given.startswith("--"):
            raise UnlearningError(
                f"{given!r} in {where} belongs to no option. Options begin with two hyphens: see --help."
            )
        close = difflib.get_close_matches(given, options, n=1, cutoff=0.8)
        meant = f"Did you mean {close[0]}?" if close else "`--help` lists the options, `--help_all` all of them."
        raise UnlearningError(f"{given} in {where} is no option of `{self.prog}`. {meant}")


def _own_fields(kind: type) -> list:
    """Fields that the classes of this package define or redefine, not those they inherit from others."""
    names = {
        name
        for base in kind.__mro__
        if base.__module__.startswith("hf_unlearn")
        for name in getattr(base, "__annotations__", {})
    }
    return [f for f in fields(kind) if f.name in names]
