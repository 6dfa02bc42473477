"""What the commands share: parsing, the options for data sets, loading a model with its adapter."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import datasets
import yaml
from huggingface_hub.utils import are_progress_bars_disabled
from peft import PeftModel
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging
from trl import TrlParser

from hf_unlearn.data import drop_untrainable, encode_set, load_rows
from hf_unlearn.errors import UnlearningError, explaining
from hf_unlearn.evaluation.batching import process_state
from hf_unlearn.extrapolation import (
    LoraAdapter,
    MergeReport,
    SafetensorsCheckpoint,
    resolve_model,
    verify_fingerprint_files,
)
from hf_unlearn.extrapolation.sharded import failing_together
from hf_unlearn.locks import working_in
from hf_unlearn.quantisation import use_training_kernels


console = Console(soft_wrap=True)

WITHOUT_RETAIN = (
    " Without it nobody can say what else the model lost. If you have none, use rows sampled from the model before "
    "forgetting: retain_sample.jsonl beside the adapter, or what `hf-unlearn sample` writes."
)


class JsonOutput:
    """
    With `--json`, one JSON document on stdout and nothing else: what a command prints goes to stderr, and what it reports
    here is written when it ends. The context of a whole command; one that raises writes no document.
    """

    def __init__(self) -> None:
        self._stdout: TextIO | None = None
        self._document: dict[str, Any] = {}

    def start(self) -> None:
        """Keep stdout for the document."""
        if self._stdout is None:
            self._stdout, sys.stdout = sys.stdout, sys.stderr

    def report(self, **entries: Any) -> None:
        """Add entries to the document. Those of a command that calls another come together in one document."""
        self._document |= entries

    def __enter__(self) -> None:
        self._document = {}

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        stdout, self._stdout = self._stdout, None
        if stdout is None:
            return
        sys.stdout = stdout
        if kind is None and int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(_jsonable(self._document), ensure_ascii=False, allow_nan=False))


json_output = JsonOutput()


def _jsonable(content: Any) -> Any:
    """The content with `None` for what JSON has no number for, and paths as text."""
    if isinstance(content, dict):
        return {str(name): _jsonable(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_jsonable(value) for value in content]
    if isinstance(content, Path):
        return str(content)
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_plan(plan: str) -> None:
    """Print what a run would do, for `--dry_run`."""
    console.print(plan)
    json_output.report(dry_run=True, plan=plan)


def describe_merge(report: MergeReport) -> dict[str, Any]:
    """What a merge has written, for `--json`; `unlearning.json` has the rest."""
    return {item.name: getattr(report, item.name) for item in fields(report) if item.name != "provenance"}


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


@dataclass
class DataArguments:
    """
    The two sets.

    Args:
        forget_dataset (`str`, *optional*): Forget set.
        retain_dataset (`str`, *optional*): Retain set.
        forget_config, forget_split, retain_config, retain_split (`str`, *optional*): Configuration and split of each.
    """

    forget_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Forget set: a json, jsonl, csv or parquet file, a Hub id, or `people/forget` (sample set)."
        },
    )
    retain_dataset: str | None = field(
        default=None,
        metadata={"help": "Retain set, in any of the same forms: what must stay, of the same kind as the forget set."},
    )
    forget_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub forget set."})
    forget_split: str | None = field(default=None, metadata={"help": "Split of the forget set."})
    retain_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub retain set."})
    retain_split: str | None = field(default=None, metadata={"help": "Split of the retain set."})

    def load(self, name: str) -> datasets.Dataset | None:
        """Load the set `name` (`"forget"`, `"retain"`, ...), or `None` where it is not given."""
        source = getattr(self, f"{name}_dataset")
        if source is None:
            return None
        config, split = getattr(self, f"{name}_config"), getattr(self, f"{name}_split")
        return load_rows(source, config=config, split=split, name=f"{name} set")

    def load_required(self, name: str) -> datasets.Dataset:
        """Load a set that must be given."""
        rows = self.load(name)
        if rows is None:
            raise UnlearningError(
                f"--{name}_dataset is required: a json, jsonl, csv or parquet file, a Hub id, or people/{name}."
                + (WITHOUT_RETAIN if name == "retain" else "")
            )
        return rows


@dataclass
class EvaluationDataArguments(DataArguments):
    """
    The two sets and hold-out rows.

    Args:
        holdout_dataset (`str`, *optional*): Hold-out set.
        holdout_config, holdout_split (`str`, *optional*): Its configuration and split.
    """

    holdout_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hold-out set: rows of the same kind as the forget set that the model never saw. With it, α is "
            "chosen so that forget rows look like these."
        },
    )
    holdout_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub hold-out set."})
    holdout_split: str | None = field(default=None, metadata={"help": "Split of the hold-out set."})


def prepare_set(
    rows: datasets.Dataset, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> datasets.Dataset:
    """Tokenise a set for evaluation and leave out rows without an answer."""
    return drop_untrainable(encode_set(rows, tokenizer, max_length, name=name))


def base_of(adapter: LoraAdapter, base: str | None) -> str:
    """The base model given, or the one that the adapter names."""
    name = base or adapter.config.base_model_name_or_path or adapter.provenance.get("base", {}).get("id")
    if not name:
        raise UnlearningError(f"{adapter.id} does not say which base it was trained on. Name it with --base.")
    return name


def verified_checkpoint(base: str, adapter: LoraAdapter, check_base: bool = True) -> SafetensorsCheckpoint:
    """The files of a base model, which by the adapter's record must be the one it was trained on."""
    checkpoint = SafetensorsCheckpoint(resolve_model(base))
    fingerprint = (adapter.provenance.get("base") or {}).get("fingerprint")
    if check_base and fingerprint is not None:
        verify_fingerprint_files(fingerprint, checkpoint)
    return checkpoint


def load_with_adapter(
    base: str,
    adapter: LoraAdapter,
    dtype: str,
    check_base: bool = True,
    quantization_config: BitsAndBytesConfig | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a base model with its adapter, live, and the tokenizer."""
    folder = verified_checkpoint(base, adapter, check_base).folder
    tokenizer = load_tokenizer(folder)
    model = PeftModel.from_pretrained(load_causal_lm(folder, dtype, quantization_config), adapter.folder)
    return model.eval(), tokenizer


def load_tokenizer(
    model: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a model.

    Args:
        model (`str` or `Path`): Folder or Hub id of the model.
        revision (`str`, *optional*): Its revision on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run code that comes with the model.
    """
    try:  # where it is not given, transformers would ask at the terminal whether to run code
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UnlearningError(
            f"No tokenizer can be loaded from {model}. Check the name, or put the files of the model's own tokenizer "
            f"(tokenizer.json, tokenizer_config.json) into its folder. The reason: {error}"
        ) from error


def load_causal_lm(folder: Path, dtype: str, quantization_config: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """Load a model onto the device of this process, quantised if asked."""
    with quiet_loading(), explaining(f"The model {folder} cannot be loaded", "Check its files, or save them again."):
        options = {"dtype": dtype, "quantization_config": quantization_config}
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    use_training_kernels(model)
    return model.to(process_state().device).eval()


class quiet_loading:
    """Silences the progress bars of weight loading, which say nothing for a model that loads in seconds."""

    def __enter__(self) -> None:
        self._shown = logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        if self._shown:
            logging.enable_progress_bar()


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of an output folder. Every process enters; the main one holds the lock."""
    with ExitStack() as stack:
        with failing_together():
            if process_state().is_main_process:
                stack.enter_context(working_in(folder))
        yield


def refuse_existing(folder: Path, overwrite: bool, option: str = "--overwrite") -> None:
    """Refuse a non-empty output folder unless it may be replaced."""
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UnlearningError(f"{folder} exists and is not empty. Name another --output_dir, or pass {option}.")


def refuse_idle(arguments: Any, options: Iterable[str], why: str) -> None:
    """
    Refuse options that would change nothing, rather than let them be believed in.

    Args:
        arguments (`dataclass`): Parsed options.
        options (iterable of `str`): Names of those without effect. Names of no option are passed over.
        why (`str`): When they have none, e.g. `"with --log"`.
    """
    defaults = {
        option.name: option.default_factory() if option.default is MISSING else option.default
        for option in fields(arguments)
    }
    given = [name for name in options if name in defaults and getattr(arguments, name) != defaults[name]]
    if given:
        names = ", ".join(f"--no_{name}" if defaults[name] is True else f"--{name}" for name in given)
        verb, pronoun = ("has", "it") if len(given) == 1 else ("have", "them")
        raise UnlearningError(f"{names} {verb} no effect {why}. Leave {pronoun} out.")


def parse_alphas(values: list[float]) -> list[float]:
    """Check a list of α given on the command line."""
    for value in values:
        if not 0 < value < float("inf"):
            raise UnlearningError(f"--alphas: {value} is not possible, each must be a finite number above 0.")
    return sorted(set(values))


def stderr(message: str) -> None:
    """Print a line where it does not mix with a command's output."""
    print(message, file=sys.stderr)
