"""`hf-unlearn audit`: what is left for someone who tries."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from peft import PeftModel
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.audit import ATTACKS, SYSTEM_PROMPT, Audit, AuditOptions, make_case, plan_audit, run_audit, write_audit
from hf_unlearn.audit.auditing import read_retrained
from hf_unlearn.audit.case import Case
from hf_unlearn.audit.report import OUTPUTS, summary
from hf_unlearn.cli import EXIT_FAILED, EXIT_OK
from hf_unlearn.cli.common import (
    EvaluationDataArguments,
    alone_in,
    base_of,
    load_causal_lm,
    load_tokenizer,
    load_with_adapter,
    refuse_existing,
    refuse_idle,
    verified_checkpoint,
)
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.terminal import console, json_output, print_plan, stderr
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import parse_batch_size
from hf_unlearn.extrapolation import LoraAdapter, atomic_folder, package_versions, resolve_model
from hf_unlearn.extrapolation.arithmetic import check_alpha
from hf_unlearn.extrapolation.live import adapter_scale
from hf_unlearn.extrapolation.provenance import read_provenance


OF_ATTACKS = {  # options that have an effect on one attack only
    "relearning": tuple(f"relearn_{name}" for name in ("share", "steps", "learning_rate", "batch_size", "rank")),
    "paraphrase": ("paraphrased_questions",),
    "prefix": ("prefix_shares",),
    "few_shot": ("few_shot",),
    "system_prompt": ("system_prompt",),
    "membership": ("auc_tolerance",),
    "reverse": ("reverse_steps",),
}
STYLES = {"leaks": "bold red", "holds": "green", "unclear": "yellow"}

DESCRIPTION = """\
Try to get back out of a model what it was made to forget: by a little training, coarser weights, other words, the
beginning of the answer, examples, a system turn, and by walking back beyond the base. Each attack gets a verdict by a
stated rule. Writes audit.html and audit.json. The weights are put back after every attack; nothing else is written."""

EXAMPLE = """\
  hf-unlearn audit --model forget-model --base base-model --forget_dataset forget.jsonl \\
      --retain_dataset retain.jsonl --holdout_dataset holdout.jsonl --output_dir audit
  hf-unlearn audit --adapter run --alpha 0.875 --attacks relearning quantisation --forget_dataset forget.jsonl \\
      --retain_dataset retain.jsonl --holdout_dataset holdout.jsonl --output_dir audit"""


@dataclass
class AuditArguments(EvaluationDataArguments):
    """
    Options of `hf-unlearn audit`.

    Args:
        model (`str`, *optional*): Model to audit.
        adapter (`str`, *optional*): Or an adapter on its base.
        alpha (`float`, *optional*): The α of a memorising adapter.
        base (`str`, *optional*): Model before forgetting.
        holdout_dataset (`str`, *optional*): Hold-out set, by which the attacks are judged.
        retrained_audit (`str`, *optional*): Audit of a retrained model, by which they are judged.
        paraphrased_questions (`str`, *optional*): Column of the questions in other words.
        attacks (list of `str`, *optional*): The attacks to run.
        margin (`float`, *optional*, defaults to 0.1): What an attack must recover to leak.
        auc_tolerance (`float`, *optional*, defaults to 0.1): How far the AUC may be from 0.5.
        relearn_share (`float`, *optional*, defaults to 0.25): Share of the forget rows that is trained on.
        relearn_steps (`int`, *optional*, defaults to 10): Optimiser steps.
        relearn_learning_rate (`float`, *optional*, defaults to 5e-4): Learning rate.
        relearn_batch_size (`int`, *optional*, defaults to 8): Most rows in a step.
        relearn_rank (`int`, *optional*, defaults to 16): Rank of the LoRA adapter.
        prefix_shares (list of `float`, *optional*): Shares of the answer that are given.
        few_shot (`int`, *optional*, defaults to 3): Other forget rows in the prompt.
        system_prompt (`str`, *optional*): The system turn.
        reverse_steps (list of `float`, *optional*): How far to walk beyond the base.
        limit (`int`, *optional*): Rows of each set.
        max_length (`int`, *optional*, defaults to 1024): Longest sequence.
        max_new_tokens (`int`, *optional*, defaults to 200): Longest generated answer.
        batch_size (`str`, *optional*, defaults to `"auto"`): Rows in a batch.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype the model is loaded in.
        output_dir (`str`): Folder to write.
        check_base (`bool`, *optional*, defaults to `True`): Whether to refuse another base than the adapter's.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
        fail_on_leak (`bool`, *optional*, defaults to `False`): Whether to exit with 1 where something leaks.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and plan only.
    """

    model: str | None = field(default=None, metadata={"help": "Model to audit: a folder or a Hub id."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Or an adapter: a memorising one with --alpha, or a forget adapter as it is. It is merged in memory."
        },
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "The α at which to audit a memorising adapter."},
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "Model before forgetting, for the reverse extrapolation: a folder or a Hub id. If not given, the "
            "folder that unlearning.json beside the model names, where it is there, or the adapter's."
        },
    )
    holdout_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hold-out set: rows of the same kind as the forget set that the model never saw. The attacks are "
            "judged by them."
        },
    )
    retrained_audit: str | None = field(
        default=None,
        metadata={
            "help": "audit.json of a model retrained without the forget set, audited on the same rows. The attacks are "
            "judged by it."
        },
    )
    paraphrased_questions: str | None = field(
        default=None,
        metadata={
            "help": "Column of the forget set with the questions in other words; `paraphrased_question` where there is one."
        },
    )
    attacks: list[str] = field(
        default_factory=lambda: list(ATTACKS), metadata={"help": "The attacks to run.", "choices": ATTACKS}
    )
    margin: float = field(
        default=0.1,
        metadata={"help": "What an attack must recover to leak: this share of what the reference leaves to 1."},
    )
    auc_tolerance: float = field(
        default=0.1, metadata={"help": "How far the membership AUC may be from 0.5, on either side."}
    )
    relearn_share: float = field(
        default=0.25, metadata={"help": "Share of the forget rows that is trained on, drawn by the seed."}
    )
    relearn_steps: int = field(default=10, metadata={"help": "Optimiser steps of the training."})
    relearn_learning_rate: float = field(default=5e-4, metadata={"help": "Its learning rate, constant."})
    relearn_batch_size: int = field(default=8, metadata={"help": "Most rows in one of its steps."})
    relearn_rank: int = field(default=16, metadata={"help": "Rank of its LoRA adapter on all linear layers."})
    prefix_shares: list[float] = field(
        default_factory=lambda: [0.25, 0.5], metadata={"help": "Shares of the answer that are given."}
    )
    few_shot: int = field(default=3, metadata={"help": "Other forget rows in the prompt, with their answers."})
    system_prompt: str = field(
        default=SYSTEM_PROMPT, metadata={"help": "The system turn that asks for what was forgotten."}
    )
    reverse_steps: list[float] = field(
        default_factory=lambda: [0.5, 1.0],
        metadata={"help": "How far to walk beyond the base, in ways from the base to the model."},
    )
    limit: int | None = field(default=None, metadata={"help": "First rows of each set only, for a trial."})
    max_length: int = field(default=1024, metadata={"help": "Longest sequence, in tokens."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest generated answer, in tokens."})
    batch_size: str = field(default="auto", metadata={"help": "Rows in a batch, or `auto`. It changes no value."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows to train on, their order, and the examples."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype the model is loaded in.", "choices": ["float32", "bfloat16", "float16"]},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write; it appears once it is whole."})
    check_base: bool = field(
        default=True, metadata={"help": "Refuse a base other than the one the adapter was trained on."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it exists."})
    fail_on_leak: bool = field(default=False, metadata={"help": "Exit with 1 if anything leaks."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check all but the weights, print what would be done, and what cannot and why."},
    )

    @property
    def audit_options(self) -> AuditOptions:
        """The options of the attacks."""
        given = {name: getattr(self, name) for name in (option.name for option in fields(AuditOptions))}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return AuditOptions(**given | {"batch_size": parse_batch_size(self.batch_size, "--batch_size")})


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("audit", [AuditArguments], DESCRIPTION, EXAMPLE).parse(argv)
    _check(arguments)
    options, output_dir = arguments.audit_options, Path(arguments.output_dir).expanduser()
    refuse_existing(output_dir, arguments.overwrite)
    adapter = None if arguments.adapter is None else LoraAdapter.load(arguments.adapter)
    _check_alpha(arguments, adapter)
    base, alpha = _before_forgetting(arguments, adapter)
    if arguments.dry_run:
        case = _case(arguments, options, load_tokenizer(_source(arguments, adapter)), None, base, alpha)
        read_retrained(arguments.retrained_audit, case)
        print_plan(_plan(arguments, case))
        return EXIT_OK
    with alone_in(output_dir):
        model, tokenizer = _load(arguments, adapter)
        case = _case(arguments, options, tokenizer, model, base, alpha)
        audit = run_audit(case, arguments.retrained_audit, lambda title: stderr(f"{title} …"))
        audit.facts = _facts(arguments, base, alpha)
        with atomic_folder(output_dir, arguments.overwrite) as folder:
            write_audit(folder, audit)
    console.print(verdicts(audit))
    console.print(f"{summary(audit)} Written to {output_dir}; open {output_dir}/audit.html.")
    json_output.report(**audit.to_dict())
    return EXIT_FAILED if arguments.fail_on_leak and audit.leaks else EXIT_OK


def verdicts(audit: Audit) -> Table:
    """One line an attack."""
    table = Table("attack", "verdict", "in words", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in audit.findings.values():
        words = " ".join([finding.words, *finding.notes])
        table.add_row(finding.title, finding.verdict, words, style=STYLES.get(finding.verdict))
    return table


def _check(arguments: AuditArguments) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnlearningError("An audit is for one process. Run it without a launcher.")
    if (arguments.model is None) == (arguments.adapter is None):
        raise UnlearningError("Pass one of --model and --adapter. See `hf-unlearn audit --help`.")
    if arguments.output_dir is None:
        raise UnlearningError("--output_dir is required. See `hf-unlearn audit --help`.")
    if arguments.model is not None:
        refuse_idle(arguments, ["alpha", "check_base"], "with --model, only with --adapter")
    for attack, names in OF_ATTACKS.items():
        if attack not in arguments.attacks:
            refuse_idle(arguments, names, f"without the attack {attack}")


def _check_alpha(arguments: AuditArguments, adapter: LoraAdapter | None) -> None:
    if adapter is None:
        return
    if adapter.is_result:
        refuse_idle(arguments, ["alpha"], "with an adapter that is a result as it stands")
    elif arguments.alpha is None:
        raise UnlearningError("--alpha is required with a memorising adapter: at which α is it to be audited?")
    else:
        check_alpha(arguments.alpha)


def _before_forgetting(arguments: AuditArguments, adapter: LoraAdapter | None) -> tuple[str | None, float | None]:
    """The base to walk back to, and the α of the model, as far as they are given or recorded."""
    if adapter is not None:
        base = base_of(adapter, arguments.base)
        return base, arguments.alpha or adapter.provenance.get("alpha")
    provenance = read_provenance(resolve_model(arguments.model))
    named = (provenance.get("base") or {}).get("id")
    base = arguments.base or (named if named and Path(named).is_dir() else None)
    if base is None and named and "reverse" in arguments.attacks:
        stderr(
            f"unlearning.json names the base {named}, which is no folder here. Pass it with --base to walk back to it."
        )
    return base, provenance.get("alpha")


def _source(arguments: AuditArguments, adapter: LoraAdapter | None) -> Path:
    """Folder of the tokenizer."""
    if adapter is None:
        return resolve_model(arguments.model)
    return verified_checkpoint(base_of(adapter, arguments.base), adapter, arguments.check_base).folder


def _case(
    arguments: AuditArguments,
    options: AuditOptions,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None,
    base: str | None,
    alpha: float | None,
) -> Case:
    sets = {"forget": arguments.load_required("forget"), "retain": arguments.load_required("retain")}
    return make_case(
        tokenizer,
        sets | {"holdout": arguments.load("holdout")},
        options,
        model=model,
        base=base,
        alpha=alpha,
        paraphrased_questions=arguments.paraphrased_questions,
        limit=arguments.limit,
        progress=True,
    )


def _load(arguments: AuditArguments, adapter: LoraAdapter | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with plain weights: an adapter is merged into its base in memory."""
    if adapter is None:
        folder = resolve_model(arguments.model)
        return load_causal_lm(folder, arguments.dtype), load_tokenizer(folder)
    base = base_of(adapter, arguments.base)
    model, tokenizer = load_with_adapter(base, adapter, arguments.dtype, arguments.check_base)
    return _merged(model, 1.0 if adapter.is_result else -arguments.alpha), tokenizer


def _merged(model: PeftModel, scale: float) -> PreTrainedModel:
    """The base plus `scale` times the update."""
    with adapter_scale(model, scale):
        return model.merge_and_unload()


def _plan(arguments: AuditArguments, case: Case) -> str:
    """What a run would do, and what it cannot and why."""
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in case.rows.items())
    what = arguments.model or f"{arguments.adapter} at α = {arguments.alpha}"
    lines = [f"  {name}: {words}" for name, words in plan_audit(case).items()]
    files = ", ".join(f"{arguments.output_dir}/{name}" for name in OUTPUTS)
    return "\n".join([f"Would audit {what} on {counts} rows:", *lines, f"writes: {files}"])


def _facts(arguments: AuditArguments, base: str | None, alpha: float | None) -> dict[str, str]:
    facts = {"Audited": arguments.model or arguments.adapter, "Base": base, "α": alpha and f"{alpha:g}"}
    facts |= {"Judged by": arguments.retrained_audit or arguments.holdout_dataset, "Seed": str(arguments.seed)}
    return {name: value for name, value in facts.items() if value is not None} | package_versions()
