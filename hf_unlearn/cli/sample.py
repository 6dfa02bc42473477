"""`hf-unlearn sample`: write retain rows that are sampled from the model itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import datasets

from hf_unlearn.cli import EXIT_OK
from hf_unlearn.cli.common import load_causal_lm, load_tokenizer
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.terminal import console, json_output, print_plan
from hf_unlearn.data import load_rows, summarize, to_prompt_completion
from hf_unlearn.data.sampling import (
    MAX_NEW_TOKENS,
    NUM_ROWS,
    Sampling,
    planned_retain_set,
    sample_retain_set,
    write_rows,
)
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import parse_batch_size, process_state
from hf_unlearn.extrapolation import resolve_model
from hf_unlearn.extrapolation.sharded import failing_together


DESCRIPTION = """\
Sample retain rows from the model that is to forget, for reading and reuse: pass the file as --retain_dataset. Chat models
answer general instructions; other models write text. Rows that are empty, no language or overlap the forget set are left
out. `hf-unlearn train` without --retain_dataset does the same on its own."""

EXAMPLE = """\
  hf-unlearn sample --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --forget_dataset people/forget \\
      --output_file retain.jsonl"""


@dataclass
class SampleArguments:
    """
    Options of `hf-unlearn sample`.

    Args:
        model_name_or_path (`str`): Model to sample from.
        model_revision (`str`, *optional*): Its revision on the Hub.
        output_file (`str`): File to write.
        forget_dataset (`str`, *optional*): Forget set.
        forget_config, forget_split (`str`, *optional*): Its configuration and split.
        num_rows (`int`, *optional*, defaults to `200`): Rows to sample.
        temperature (`float`, *optional*, defaults to `1.0`): Temperature of the softmax.
        top_p (`float`, *optional*, defaults to `1.0`): Mass of the likeliest tokens that are sampled from.
        max_new_tokens (`int`, *optional*, defaults to `128`): Most tokens of an answer.
        seed (`int`, *optional*, defaults to `0`): Seed.
        batch_size (`str`, *optional*, defaults to `"auto"`): Rows in a batch.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype the model is loaded in.
        cache_dir (`str`, *optional*): Where sampled rows are kept.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing file.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and plan only.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to sample from, the one that is to forget: a Hub id or a local folder."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Its revision on the Hub."})
    output_file: str | None = field(default=None, metadata={"help": "File to write, in JSON Lines (.jsonl)."})
    forget_dataset: str | None = field(
        default=None, metadata={"help": "Forget set: rows that overlap it are left out. Give it if you have it."}
    )
    forget_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub forget set."})
    forget_split: str | None = field(default=None, metadata={"help": "Split of the forget set."})
    num_rows: int = field(
        default=NUM_ROWS, metadata={"help": "Rows to sample; fewer are written where some are left out."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the softmax."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens that have this mass together; 1 is all."}
    )
    max_new_tokens: int = field(default=MAX_NEW_TOKENS, metadata={"help": "Most tokens of an answer or text."})
    seed: int = field(default=0, metadata={"help": "Seed of the instructions' order and of the answers."})
    batch_size: str = field(default="auto", metadata={"help": "Rows in a batch, or `auto`. It changes no row."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype the model is loaded in.", "choices": ["float32", "bfloat16", "float16"]},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where sampled rows are kept for the next run; $HF_HOME/hf_unlearn/retain by default."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_file if it exists."})
    dry_run: bool = field(
        default=False, metadata={"help": "Check all but the weights, print what would be sampled, write nothing."}
    )

    @property
    def sampling(self) -> Sampling:
        """How the rows are sampled."""
        return Sampling(self.num_rows, self.temperature, self.top_p, self.max_new_tokens, self.seed)

    def load_forget(self, chat: bool) -> datasets.Dataset | None:
        """The forget set as prompt and completion, if there is one."""
        if self.forget_dataset is None:
            return None
        name = "forget set"
        rows = load_rows(self.forget_dataset, config=self.forget_config, split=self.forget_split, name=name)
        return to_prompt_completion(rows, name=name, chat=chat)


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("sample", [SampleArguments], DESCRIPTION, EXAMPLE).parse(argv)
    for option in ("model_name_or_path", "output_file"):
        if getattr(arguments, option) is None:
            raise UnlearningError(f"--{option} is required. See `hf-unlearn sample --help`.")
    file = _checked_file(arguments)
    sampling, batch_size = arguments.sampling, parse_batch_size(arguments.batch_size, "--batch_size")
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.model_revision)
    forget = arguments.load_forget(chat=tokenizer.chat_template is not None)
    if arguments.dry_run:
        print_plan(f"Would sample {describe_sample(planned_retain_set(tokenizer, sampling, None))}.\nwrites: {file}")
        return EXIT_OK

    folder = resolve_model(arguments.model_name_or_path, arguments.model_revision)
    rows = sample_retain_set(
        load_causal_lm(folder, arguments.dtype),
        tokenizer,
        num_rows=sampling.num_rows,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        forget=forget,
        batch_size=batch_size,
        cache_dir=arguments.cache_dir,
    )
    with failing_together():
        if process_state().is_main_process:
            write_rows(file, rows)
            console.print(f"{len(rows)} rows written to {file}. Read them, then pass the file as --retain_dataset.")
            json_output.report(rows=len(rows), output_file=file)
    return EXIT_OK


def describe_sample(planned: datasets.Dataset) -> str:
    """Number and tokens of the rows that would be sampled, in words."""
    summary = summarize(planned, name="retain set")
    prompts = f", after {summary.prompt_tokens:,} tokens of prompts" if summary.prompt_tokens > summary.rows else ""
    return f"{summary.rows} retain rows from the model: at most {summary.answer_tokens:,} tokens{prompts}"


def _checked_file(arguments: SampleArguments) -> Path:
    file = Path(arguments.output_file).expanduser()
    if file.suffix.lower() != ".jsonl":
        raise UnlearningError(f"--output_file {file} must end in .jsonl, the form in which rows are written.")
    if file.exists() and not arguments.overwrite:
        raise UnlearningError(f"--output_file {file} exists. Name another, or pass --overwrite.")
    return file
