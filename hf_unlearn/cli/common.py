"""What the commands share: the options for data sets, loading a model with its adapter, checks of options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub.utils import are_progress_bars_disabled
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hf_unlearn.data import drop_untrainable, encode_set, load_rows
from hf_unlearn.errors import UnlearningError, explaining
from hf_unlearn.evaluation.batching import process_state
from hf_unlearn.extrapolation import (
    LoraAdapter,
    SafetensorsCheckpoint,
    resolve_model,
    verify_fingerprint_files,
)
from hf_unlearn.extrapolation.sharded import failing_together
from hf_unlearn.locks import working_in
from hf_unlearn.quantisation import use_training_kernels


WITHOUT_RETAIN = (
    " Without it nobody can say what else the model lost. If you have none, use rows sampled from the model before "
    "forgetting: retain_sample.jsonl beside the adapter, or what `hf-unlearn sample` writes."
)


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
def alone_in(folder: str | Path, dry_run: bool = False) -> Iterator[None]:
    """Keep other runs out of an output folder, unless nothing is written. Every process enters; the main one holds the lock."""
    with ExitStack() as stack:
        with failing_together():
            if process_state().is_main_process and not dry_run:
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
