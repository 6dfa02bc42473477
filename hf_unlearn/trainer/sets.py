"""The sets of a run: read, tokenised and checked, sampled where there is no retain set."""

from __future__ import annotations

import copy
import os
from typing import Any

import datasets
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import create_model_from_path

from hf_unlearn.data.checks import check_sets, drop_untrainable, raise_for_untrainable, summarize
from hf_unlearn.data.formats import to_prompt_completion
from hf_unlearn.data.hard import paraphrased_rows, wrong_answer_rows
from hf_unlearn.data.loading import load_rows
from hf_unlearn.data.sampling import SHARDED, Sampling, sample_retain_set
from hf_unlearn.data.tokenization import encode_set, tokenize_rows
from hf_unlearn.errors import UnlearningError, explaining
from hf_unlearn.extrapolation.fingerprint import is_quantised
from hf_unlearn.quantisation import use_training_kernels
from hf_unlearn.trainer.unlearning_config import UnlearningConfig


SAMPLED_FILE = "retain_sample.jsonl"  # beside the adapter, where retain rows were sampled


class TrainingSets:
    """
    What must go and what is held, tokenised. The retain set is added after construction.

    Args:
        forget (`Any`): The forget set as [`~hf_unlearn.data.load_rows`] takes it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        args ([`UnlearningConfig`]): Options; those of the data are read.

    Attributes:
        forget (`datasets.Dataset`): The forget rows, then their paraphrases.
        wrong (`datasets.Dataset` or `None`): Wrong answers to the prompts of the forget set, which are held too.
        retain (`datasets.Dataset` or `None`): The retain set.
        report ([`~hf_unlearn.data.DataReport`]): What is in them.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: a column or a row that cannot be used.
    """

    def __init__(self, forget: Any, tokenizer: PreTrainedTokenizerBase, args: UnlearningConfig) -> None:
        self._tokenizer = tokenizer
        self._args = args
        self.retain: datasets.Dataset | None = None
        self.wrong: datasets.Dataset | None = None
        self._num_paraphrases = 0
        self.forget = self._read_forget(load_rows(forget, name="forget set"))
        self._check()

    def add_retain(self, rows: Any) -> None:
        """Add the retain set, in any form that [`~hf_unlearn.data.load_rows`] takes."""
        self.retain = tokenized(rows, "retain set", self._tokenizer, self._args)
        self._check()
        self.retain = drop_untrainable(self.retain)

    @property
    def held(self) -> datasets.Dataset:
        """The rows under the retain term: the retain set and the wrong answers. None where there is no retain set."""
        if self.retain is None:
            return self.forget.select([])
        if self.wrong is None:
            return self.retain
        parts = [part.select_columns(["input_ids", "labels"]) for part in (self.retain, self.wrong)]
        return datasets.concatenate_datasets(parts)

    def _read_forget(self, rows: datasets.Dataset) -> datasets.Dataset:
        args, name = self._args, "forget set"
        if not (args.paraphrases or args.paraphrased_questions or args.wrong_answers):
            return tokenized(rows, name, self._tokenizer, args)
        if _is_tokenized(rows):
            raise UnlearningError(
                "The forget set is tokenised already, so paraphrases, paraphrased_questions and wrong_answers cannot be "
                "read with it. Pass its rows as text or messages."
            )
        pairs = to_prompt_completion(rows, name=name, chat=self._tokenizer.chat_template is not None)
        pairs = pairs.select_columns(["prompt", "completion", "row"])
        paraphrases = None
        if args.paraphrases or args.paraphrased_questions:
            paraphrases = paraphrased_rows(pairs, rows, answers=args.paraphrases, questions=args.paraphrased_questions)
            self._num_paraphrases = len(paraphrases)
        if args.wrong_answers:
            wrong = wrong_answer_rows(pairs, rows, args.wrong_answers, paraphrases=paraphrases)
            self.wrong = self._encode(wrong, "wrong answers")
        if paraphrases is not None:
            pairs = datasets.concatenate_datasets([pairs, paraphrases])
        return self._encode(pairs, name)

    def _encode(self, pairs: datasets.Dataset, name: str) -> datasets.Dataset:
        return tokenize_rows(pairs, self._tokenizer, self._args.max_length, self._args.dataset_num_proc, name)

    def _check(self) -> None:
        self.report = check_sets(self.forget, self.retain, max_length=self._args.max_length)
        self.report.paraphrased_rows = self._num_paraphrases
        if self.wrong is not None:
            self.report.wrong_answers = summarize(self.wrong, name="wrong answers", max_length=self._args.max_length)
        raise_for_untrainable(self.report)


def tokenized(rows: Any, name: str, tokenizer: PreTrainedTokenizerBase, args: UnlearningConfig) -> datasets.Dataset:
    """A set as it is given, tokenised unless it is already."""
    rows = load_rows(rows, name=name)
    if _is_tokenized(rows):
        return rows
    return encode_set(rows, tokenizer, args.max_length, num_proc=args.dataset_num_proc, name=name)


def _is_tokenized(rows: datasets.Dataset) -> bool:
    return {"input_ids", "labels"} <= set(rows.column_names)


# ---- Without a retain set ----


def sampling_of(args: UnlearningConfig) -> Sampling:
    """How the retain rows of a run are sampled."""
    return Sampling(args.retain_sample_size, args.retain_sample_temperature, seed=args.seed)


def sample_retain_rows(
    model: PreTrainedModel, forget: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, args: UnlearningConfig
) -> datasets.Dataset:
    """
    Sample the retain rows of a run from the model before training.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model, without an adapter.
        forget (`datasets.Dataset`): The tokenised forget set.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        args ([`UnlearningConfig`]): Options of the run.
    """
    if is_quantised(model):
        use_training_kernels(model)
    elif getattr(model, "hf_device_map", None) is None:
        model.to(args.device)
    sampling = sampling_of(args)
    return sample_retain_set(
        model,
        tokenizer,
        num_rows=sampling.num_rows,
        temperature=sampling.temperature,
        seed=sampling.seed,
        forget=forget,
        progress=not args.disable_tqdm,
    )


def load_reference(
    model: str | PreTrainedModel, args: UnlearningConfig, quantization_config: BitsAndBytesConfig | None
) -> tuple[PreTrainedModel, UnlearningConfig]:
    """
    Load the model as `SFTTrainer` does, ahead of it, so that rows can be sampled from it.

    Returns:
        `tuple`: the model, and the options with which to hand it on.
    """
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UnlearningError(SHARDED)
    if not isinstance(model, str):
        return model, args
    options = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.num_processes > 1:
        options["device_map"] = None
    args = copy.copy(args)
    args.model_init_kwargs = None  # they have been used
    with explaining(f"The model {model} cannot be loaded", "Check its folder or name."):
        return create_model_from_path(model, **options), args
