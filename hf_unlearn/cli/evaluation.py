"""What the commands that evaluate share: their options, and what they write."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.cli.common import EvaluationDataArguments
from hf_unlearn.data.formats import text_of
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import (
    Choice,
    Evaluation,
    Evaluator,
    Protocol,
    ResultCache,
    RowText,
    collapse,
    read_log,
    write_open_unlearning,
    write_report,
    write_tables,
)
from hf_unlearn.evaluation.batching import BatchSize
from hf_unlearn.evaluation.protocols import custom_protocol, lume_protocol, muse_protocol, tofu_protocol
from hf_unlearn.evaluation.protocols.harness import run_harness
from hf_unlearn.evaluation.protocols.wmdp import wmdp_protocol
from hf_unlearn.extrapolation import resolve_model


OF_PROTOCOLS = {  # option: protocols under which it has an effect
    "forget_dataset": ("custom",),
    "retain_dataset": ("custom",),
    "holdout_dataset": ("custom",),
    "split": ("tofu", "muse", "lume"),
    "data_dir": ("tofu", "muse", "lume", "wmdp"),
    "system_prompt": ("custom", "tofu"),
    "chat_template_kwargs": ("custom", "tofu"),
    "retrained_log": ("custom", "tofu", "muse"),
    "reference_model": ("custom",),
    "mmlu": ("lume",),
}
PROTOCOLS = ("custom", "tofu", "muse", "lume", "wmdp")
OUTPUTS = ("report.html", "evaluation.json", "figures.csv", "rows.csv", "evaluation.png")

SECURITY_NOTE = (
    "Security: the base model together with the forget model or the forget adapter reveals ΔW, and θ_ref + ΔW is the "
    "model that memorised the forget set. Where the base is public, publishing the result publishes the secret."
)


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

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except ValueError as error:
                raise UnlearningError(f"--chat_template_kwargs is not JSON: {error}.") from error
        if self.batch_size != "auto" and not (str(self.batch_size).isdigit() and int(self.batch_size)):
            raise UnlearningError(f"--batch_size {self.batch_size} is neither `auto` nor a number above 0.")

    @property
    def rows_per_batch(self) -> BatchSize:
        """The batch size as the evaluator takes it."""
        return "auto" if self.batch_size == "auto" else int(self.batch_size)

    def load_protocol(self, chat: bool) -> Protocol:
        """
        The protocol with its rows.

        Args:
            chat (`bool`): Whether the tokenizer has a chat template.
        """
        self._refuse_idle_options()
        if self.protocol == "custom":
            names = [name for name in ("forget", "retain", "holdout") if getattr(self, f"{name}_dataset")]
            sets = {name: self.load_required(name) for name in dict.fromkeys(["forget", "retain", *names])}
            if self.limit is not None:
                sets = {name: rows.select(range(min(self.limit, len(rows)))) for name, rows in sets.items()}
            return custom_protocol(
                sets,
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
            benchmarks = partial(run_harness, tasks=["mmlu"], limit=self.limit, batch_size=16)
            return replace(protocol, benchmarks=benchmarks) if self.mmlu else protocol
        return wmdp_protocol(self.limit, self.data_dir)

    def _refuse_idle_options(self) -> None:
        """Refuse options that would change nothing under this protocol, rather than let them be believed in."""
        for option, protocols in OF_PROTOCOLS.items():
            if getattr(self, option, None) and self.protocol not in protocols:
                raise UnlearningError(
                    f"--{option} has no effect under --protocol {self.protocol}; it is for {', '.join(protocols)}. "
                    "Leave it out."
                )

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
        """The evaluator of a loaded model."""
        cache_dir = self.cache_dir or f"{output_dir}.cache"
        return Evaluator(
            model,
            tokenizer,
            self.load_protocol(chat=tokenizer.chat_template is not None),
            retrained=self.load_retrained(),
            reference_model=reference_model,
            batch_size=self.rows_per_batch,
            chat_template_kwargs=self.chat_template_kwargs,
            cache=None if self.no_cache else ResultCache(cache_dir),
        )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer by name or folder."""
    return AutoTokenizer.from_pretrained(resolve_model(name))


def save_evaluations(
    folder: Path,
    protocol: Protocol,
    evaluations: list[Evaluation],
    choice: Choice | None = None,
    retrained: Evaluation | None = None,
    facts: dict[str, str] | None = None,
    log_history: list[dict[str, Any]] | None = None,
    notes: list[str] | None = None,
) -> None:
    """Write the tables, the picture, the report and, for TOFU, the log in open-unlearning's shape."""
    write_tables(folder, evaluations, choice, retrained)
    if choice is not None:
        (folder / "choice.json").write_text(
            json.dumps(choice.to_dict(), indent=2, ensure_ascii=False), encoding="utf-8"
        )
    texts = {
        name: [
            RowText(text_of(prompt), text_of(completion))
            for prompt, completion in zip(content.rows["prompt"], content.rows["completion"], strict=True)
        ]
        for name, content in protocol.sets.items()
    }
    write_report(
        folder / "report.html",
        title="Unlearning report" if choice is not None else "Evaluation report",
        evaluations=evaluations,
        texts=texts,
        choice=choice,
        retrained=retrained,
        facts=facts,
        log_history=log_history,
        notes=notes or [],
    )
    if protocol.name == "tofu":
        chosen = choice.alpha if choice is not None else evaluations[-1].alpha
        shown = next(evaluation for evaluation in evaluations if evaluation.alpha == chosen)
        if shown.answers:
            write_open_unlearning(shown, folder / "TOFU_EVAL.json")


MAX_FIGURES = 8  # that fit a terminal of 80 columns
TABLE_FIGURES = {  # the first of them that there are
    "model_utility": "model\nutility",
    "forget_quality": "forget\nquality",
    "membership_auc_loss": "AUC",
    "forget_probability": "forget\nprob",
    "retain_probability": "retain\nprob",
    "holdout_probability": "holdout\nprob",
    "forget_extraction_strength": "forget\nES",
    "forget_rouge_l_recall": "forget\nROUGE",
    "retain_rouge_l_recall": "retain\nROUGE",
    "privleak": "Priv\nLeak",
    "verbmem": "verb\nmem",
    "knowmem_forget": "know\nforget",
    "knowmem_retain": "know\nretain",
    "wmdp_bio": "WMDP\nbio",
    "wmdp_chem": "WMDP\nchem",
    "wmdp_cyber": "WMDP\ncyber",
    "mmlu": "MMLU",
}


def figures_table(evaluations: list[Evaluation], choice: Choice | None = None) -> Table:
    """The main figures, one line an α, the chosen one marked; `figures.csv` has all of them."""
    names = [name for name in TABLE_FIGURES if any(evaluation.value(name) is not None for evaluation in evaluations)]
    names = names[:MAX_FIGURES]
    headers = [Column(title, justify="right", no_wrap=True) for title in ["α", *(TABLE_FIGURES[n] for n in names)]]
    table = Table(*headers, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for evaluation in evaluations:
        chosen = choice is not None and evaluation.alpha == choice.alpha
        values = [evaluation.value(name) for name in names]
        cells = ["" if value is None else f"{value:.3g}" for value in values]
        alpha = "–" if evaluation.alpha is None else f"{evaluation.alpha:.3g}"
        table.add_row(("* " if chosen else "") + alpha, *cells, style="bold" if chosen else None)
    return table


def collapses(evaluations: list[Evaluation], protocol: Protocol) -> list[str]:
    """Models that have collapsed, in words."""
    reference = next((evaluation for evaluation in evaluations if evaluation.alpha == 0), None)
    found = []
    for evaluation in evaluations:
        remark = collapse(evaluation, reference, protocol.utility)
        if remark is not None:
            found.append((f"α = {evaluation.alpha:g} " if evaluation.alpha is not None else "") + f"failed: {remark}.")
    return found
