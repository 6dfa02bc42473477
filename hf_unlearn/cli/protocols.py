"""The options of the commands that evaluate: which protocol, which rows, in which way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.cli.common import EvaluationDataArguments, refuse_idle
from hf_unlearn.cli.terminal import console
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import Evaluation, Evaluator, Protocol, ResultCache, read_log
from hf_unlearn.evaluation.batching import BatchSize, parse_batch_size, process_state
from hf_unlearn.evaluation.preparation import prepare_sets
from hf_unlearn.evaluation.protocols import (
    custom_protocol,
    lume_protocol,
    muse_protocol,
    tofu_protocol,
    wmdp_protocol,
)
from hf_unlearn.evaluation.protocols.harness import import_harness, run_harness
from hf_unlearn.evaluation.protocols.rows import first_rows
from hf_unlearn.quantisation import require_bitsandbytes


PROTOCOLS = ("custom", "tofu", "muse", "lume", "wmdp")
OF_PROTOCOLS = {  # protocols under which alone the options have an effect
    ("custom",): (
        *(f"{name}_{part}" for name in ("forget", "retain", "holdout") for part in ("dataset", "config", "split")),
        "max_new_tokens",
        "max_length",
        "reference_model",
    ),
    ("custom", "tofu"): ("system_prompt", "chat_template_kwargs"),
    ("custom", "tofu", "muse"): ("retrained_log",),
    ("custom", "tofu", "muse", "lume"): ("cache_dir",),
    ("tofu", "muse", "lume"): ("split",),
    ("tofu", "muse", "lume", "wmdp"): ("data_dir",),
    ("lume",): ("mmlu",),
}


@dataclass
class ProtocolArguments(EvaluationDataArguments):
    """
    What is evaluated, and how.

    Args:
        protocol (`str`, *optional*, defaults to `"custom"`): Benchmark.
        split (`str`, *optional*): Part of the benchmark.
        data_dir (`str`, *optional*): Local folder with the benchmark's sets.
        limit (`int`, *optional*): Rows of each set.
        retrained_log (`str`, *optional*): Log of a retrained model.
        system_prompt (`str`, *optional*): System turn before each question.
        chat_template_kwargs (`dict`, *optional*): Variables of the chat template, as JSON.
        mmlu (`bool`, *optional*, defaults to `False`): Whether to run MMLU too.
        max_new_tokens (`int`, *optional*, defaults to `200`): Longest generated answer of the custom protocol.
        max_length (`int`, *optional*, defaults to `1024`): Longest sequence of the custom protocol.
        batch_size (`str`, *optional*, defaults to `"auto"`): Rows in a batch.
        cache_dir (`str`, *optional*): Where results are kept.
        no_cache (`bool`, *optional*, defaults to `False`): Whether to keep none.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype the model is loaded in.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Whether to quantise the model to 4 bits.
        load_in_8bit (`bool`, *optional*, defaults to `False`): Whether to quantise it to 8 bits.
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`): Data type of the 4 bits.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`): Whether to quantise their scales too.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: a value that cannot be used, or an option without effect.
    """

    protocol: str = field(
        default="custom",
        metadata={
            "help": "What to evaluate: `custom` (your own sets), `tofu`, `muse`, `lume` or `wmdp` (with MMLU).",
            "choices": PROTOCOLS,
        },
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "Part of the benchmark: forget01, forget05 or forget10 (tofu, the default is the last); News or "
            "Books (muse); validation or train (lume)."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Local folder with the benchmark's sets (wmdp: task definitions); from the Hub if not given."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "First rows of each set only, for a trial."})
    retrained_log: str | None = field(
        default=None,
        metadata={
            "help": "Log of a model retrained without the forget set: our evaluation.json or open-unlearning's "
            "TOFU_EVAL.json. Forget quality, PrivLeak and the reference attack compare with it."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System turn before each question; that of the chat template if not given."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'Variables of the chat template as JSON, e.g. \'{"date_string": "10 Apr 2025"}\'.'},
    )
    mmlu: bool = field(
        default=False,
        metadata={"help": "Run MMLU too, which the final score of lume needs, by lm-evaluation-harness."},
    )
    max_new_tokens: int = field(
        default=200, metadata={"help": "Longest generated answer, in tokens (custom; benchmarks have their own)."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest sequence, in tokens (custom)."})
    batch_size: str = field(default="auto", metadata={"help": "Rows in a batch, or `auto`. It changes no value."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where results are kept so that an interrupted run goes on; <output_dir>.cache by default."},
    )
    no_cache: bool = field(default=False, metadata={"help": "Keep no results: an interrupted run starts anew."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype the model is loaded in.", "choices": ["float32", "bfloat16", "float16"]},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the model to 4 bits as it is loaded; needs bitsandbytes."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The same with 8 bits."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Data type of the 4 bits.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the scales of the 4-bit weights too (double quantisation)."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except ValueError as error:
                raise UnlearningError(f"--chat_template_kwargs is not JSON: {error}.") from error
        parse_batch_size(self.batch_size, "--batch_size")
        if self.no_cache:
            refuse_idle(self, ["cache_dir"], "with --no_cache")
        if self.load_in_4bit and self.load_in_8bit:
            raise UnlearningError("--load_in_4bit and --load_in_8bit exclude each other. Leave one out.")
        if not self.load_in_4bit:
            refuse_idle(self, ["bnb_4bit_quant_type", "use_bnb_nested_quant"], "without --load_in_4bit")
        if self.load_in_4bit or self.load_in_8bit:
            require_bitsandbytes()
        for protocols, options in OF_PROTOCOLS.items():
            if self.protocol not in protocols:
                refuse_idle(self, options, f"under --protocol {self.protocol}, only under {', '.join(protocols)}")

    @property
    def rows_per_batch(self) -> BatchSize:
        """The batch size as the evaluator takes it."""
        return parse_batch_size(self.batch_size, "--batch_size")

    @property
    def quantization_config(self) -> BitsAndBytesConfig | None:
        """How the model is quantised as it is loaded, if it is."""
        if self.load_in_4bit:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_compute_dtype=self.dtype,
                bnb_4bit_quant_type=self.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            )
        return BitsAndBytesConfig(load_in_8bit=True) if self.load_in_8bit else None

    def load_protocol(self, chat: bool) -> Protocol:
        """
        The protocol with its rows.

        Args:
            chat (`bool`): Whether the tokenizer has a chat template.

        Raises:
            [`~hf_unlearn.errors.UnlearningError`]: a missing lm-evaluation-harness, and all that the protocols refuse.
        """
        if self.mmlu or self.protocol == "wmdp":
            import_harness()  # so that it is not missed after all rows have been evaluated
        if self.protocol == "custom":
            names = [name for name in ("forget", "retain", "holdout") if getattr(self, f"{name}_dataset")]
            sets = {name: self.load_required(name) for name in dict.fromkeys(["forget", "retain", *names])}
            return custom_protocol(
                {name: first_rows(rows, self.limit) for name, rows in sets.items()},
                chat=chat,
                system_prompt=self.system_prompt,
                max_length=self.max_length,
                max_new_tokens=self.max_new_tokens,
            )
        if self.protocol == "tofu":
            split = self.split or "forget10"
            kwargs = {"data_dir": self.data_dir, "system_prompt": self.system_prompt, "limit": self.limit}
            return tofu_protocol(split, chat=chat, **kwargs)
        if self.protocol == "muse":
            return muse_protocol(self.split or "News", self.data_dir, self.limit)
        if self.protocol == "lume":
            protocol = lume_protocol(self.data_dir, self.split or "validation", self.limit)
            benchmarks = partial(run_harness, tasks=["mmlu"], limit=self.limit, batch_size=self.rows_per_batch)
            return replace(protocol, benchmarks=benchmarks) if self.mmlu else protocol
        return wmdp_protocol(self.limit, self.data_dir, self.rows_per_batch)

    def check_protocol(self, tokenizer: PreTrainedTokenizerBase) -> Protocol:
        """The protocol, after everything has been checked that can be without the weights: each row, the log."""
        protocol = self.load_protocol(chat=tokenizer.chat_template is not None)
        prepare_sets(protocol, tokenizer, self.chat_template_kwargs, self.load_retrained())
        return protocol

    def load_retrained(self) -> Evaluation | None:
        """The retrained model's log, where one is named."""
        return None if self.retrained_log is None else read_log(self.retrained_log)

    def make_evaluator(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        output_dir: Path,
        reference_model: PreTrainedModel | None = None,
    ) -> Evaluator:
        """
        The evaluator of a loaded model. Says where results are kept, if they are.

        Args:
            model (`PreTrainedModel` or [`~peft.PeftModel`]): Model.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
            output_dir (`Path`): Folder of the results, beside which the cache is by default.
            reference_model (`PreTrainedModel`, *optional*): Model before unlearning.

        Raises:
            [`~hf_unlearn.errors.UnlearningError`]: all that `load_protocol`, `read_log` and [`Evaluator`] refuse.
        """
        protocol = self.load_protocol(chat=tokenizer.chat_template is not None)
        cache = None
        if protocol.sets and not self.no_cache:  # tasks of lm-evaluation-harness are not kept
            cache = ResultCache(self.cache_dir or f"{output_dir}.cache")
            if process_state().is_main_process:
                console.print(f"Cache: {cache.folder}. It holds answers to the prompts of the sets.")
        return Evaluator(
            model,
            tokenizer,
            protocol,
            retrained=self.load_retrained(),
            reference_model=reference_model,
            batch_size=self.rows_per_batch,
            chat_template_kwargs=self.chat_template_kwargs,
            cache=cache,
        )
