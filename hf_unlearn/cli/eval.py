"""`hf-unlearn eval`: evaluate any model, or an adapter at several α, or a published log."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from hf_unlearn.cli import EXIT_FAILED, EXIT_OK
from hf_unlearn.cli.common import (
    alone_in,
    base_of,
    load_causal_lm,
    load_tokenizer,
    load_with_adapter,
    parse_alphas,
    refuse_existing,
    refuse_idle,
    verified_checkpoint,
)
from hf_unlearn.cli.outputs import (
    OUTPUTS,
    SECURITY_NOTE,
    collapses,
    describe_evaluations,
    describe_rows,
    figures_table,
    save_evaluations,
)
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.protocols import ProtocolArguments
from hf_unlearn.cli.terminal import console, json_output, print_plan
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import DEFAULT_GRID, Evaluation, Evaluator, Protocol, read_log
from hf_unlearn.evaluation.batching import process_state
from hf_unlearn.evaluation.logs import find_log
from hf_unlearn.evaluation.protocols import FIGURES
from hf_unlearn.extrapolation import LoraAdapter, atomic_folder, package_versions, resolve_model


OPTIONS_OF_LOGS = ("log", "retrained_log", "output_dir", "overwrite", "dry_run")

DESCRIPTION = """\
Evaluate a model, a memorising adapter at several α (one load, the live adapter rescaled: nothing is merged), an adapter
that is a result as it stands, or a log that is there already. All teacher-forced metrics come from one pass over the rows, all others from one generation pass.
Writes report.html, evaluation.json, figures.csv, rows.csv, evaluation.png and, for TOFU, TOFU_EVAL.json."""

EXAMPLE = """\
  hf-unlearn eval --model forget-model --protocol tofu --split forget10 --retrained_log retain90/TOFU_EVAL.json \\
      --output_dir eval
  hf-unlearn eval --adapter run --alphas 0.5 1 2 --forget_dataset forget.jsonl --retain_dataset retain.jsonl \\
      --holdout_dataset holdout.jsonl --output_dir eval
  hf-unlearn eval --log TOFU_EVAL.json --retrained_log retain90/TOFU_EVAL.json --output_dir eval"""


@dataclass
class EvalArguments(ProtocolArguments):
    """
    Options of `hf-unlearn eval`.

    Args:
        model (`str`, *optional*): Model to evaluate.
        adapter (`str`, *optional*): Memorising adapter to evaluate.
        base (`str`, *optional*): Its base model.
        alphas (list of `float`, *optional*): The α to evaluate the adapter at, besides 0.
        log (`str`, *optional*): Log to recompute.
        reference_model (`str`, *optional*): Model before unlearning, for the KL to it.
        output_dir (`str`): Folder to write.
        check_base (`bool`, *optional*, defaults to `True`): Whether to refuse another base than the recorded one.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and plan only.
    """

    model: str | None = field(default=None, metadata={"help": "Model to evaluate: a folder or a Hub id."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Or an adapter: the --output_dir of `hf-unlearn train`, or a Hub id. A memorising one is evaluated at "
            "several α, a forget adapter and those of other methods as they are."
        },
    )
    base: str | None = field(
        default=None, metadata={"help": "Base model the adapter was trained on; the one it names if not given."}
    )
    alphas: list[float] = field(
        default_factory=lambda: list(DEFAULT_GRID), metadata={"help": "The α to evaluate the adapter at, besides 0."}
    )
    log: str | None = field(
        default=None,
        metadata={"help": "Or a log (TOFU_EVAL.json, evaluation.json): all figures are computed anew from its rows."},
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "Model before unlearning, for the KL to it. An adapter needs none: it is α = 0."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write; it appears once it is whole."})
    check_base: bool = field(
        default=True, metadata={"help": "Refuse a base other than the one the adapter was trained on."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it exists."})
    dry_run: bool = field(
        default=False, metadata={"help": "Check all but the weights, print what would be evaluated."}
    )


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("eval", [EvalArguments], DESCRIPTION, EXAMPLE).parse(argv)
    _check(arguments)
    output_dir = Path(arguments.output_dir).expanduser()
    refuse_existing(output_dir, arguments.overwrite)
    with alone_in(output_dir, arguments.dry_run):
        return _evaluate(arguments, output_dir)


def _evaluate(arguments: EvalArguments, output_dir: Path) -> int:
    """Evaluate, print and write; the exit code."""
    adapter = LoraAdapter.load(arguments.adapter) if arguments.adapter is not None else None
    sets_alpha = adapter is not None and not adapter.is_result
    if adapter is not None and not sets_alpha:
        refuse_idle(arguments, ["alphas"], "with an adapter that is a result as it stands")
    if arguments.log is not None:
        protocol, evaluations, retrained = _from_log(arguments)
    elif arguments.dry_run:
        print_plan(_plan(arguments, adapter))
        return EXIT_OK
    else:
        evaluator = _load(arguments, adapter, output_dir)
        protocol, retrained = evaluator.protocol, evaluator.retrained
        alphas = parse_alphas(arguments.alphas)
        evaluations = evaluator.run(alphas) if sets_alpha else [evaluator.evaluate()]
    failures = collapses(evaluations, protocol)
    if process_state().is_main_process:
        _report(evaluations, failures)
        if arguments.dry_run:
            json_output.report(dry_run=True)
        else:
            facts = {"Evaluated": arguments.model or arguments.adapter or arguments.log} | package_versions()
            notes = [*failures, *([SECURITY_NOTE] if sets_alpha else [])]
            with atomic_folder(output_dir, arguments.overwrite) as folder:
                save_evaluations(folder, protocol, evaluations, retrained=retrained, facts=facts, notes=notes)
            console.print(f"Written to {output_dir}; open {output_dir}/report.html.")
            json_output.report(output_dir=output_dir)
    process_state().wait_for_everyone()
    return EXIT_FAILED if failures and not sets_alpha else EXIT_OK


def _report(evaluations: list[Evaluation], failures: list[str]) -> None:
    """Print the main figures, what was not computed and why, and what has collapsed."""
    console.print(figures_table(evaluations))
    for name, figure in evaluations[-1].figures.items():
        if figure.value is None:
            console.print(f"{name}: {figure.note}")
    for failure in failures:
        console.print(failure)
    json_output.report(evaluations=describe_evaluations(evaluations), collapsed=failures)


def _check(arguments: EvalArguments) -> None:
    given = [name for name in ("model", "adapter", "log") if getattr(arguments, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise UnlearningError(f"Pass one of --model, --adapter and --log; got {found}. See `hf-unlearn eval --help`.")
    if arguments.output_dir is None:
        raise UnlearningError("--output_dir is required. See `hf-unlearn eval --help`.")
    parse_alphas(arguments.alphas)
    if arguments.model is not None:
        refuse_idle(arguments, ["base", "alphas", "check_base"], "with --model, only with --adapter")
    if arguments.log is not None:
        options = [option.name for option in fields(arguments) if option.name not in OPTIONS_OF_LOGS]
        refuse_idle(arguments, options, "with --log, which is taken as it is")
    if arguments.log and arguments.retrained_log and find_log(arguments.log) == find_log(arguments.retrained_log):
        raise UnlearningError(
            f"--log and --retrained_log are the same file, {arguments.log}: a model does not compare with itself. "
            "Pass the log of the model retrained without the forget set."
        )


def _from_log(arguments: EvalArguments) -> tuple[Protocol, list[Evaluation], Evaluation | None]:
    evaluation, retrained = read_log(arguments.log), arguments.load_retrained()
    if evaluation.protocol not in FIGURES:
        raise UnlearningError(
            f"--log {arguments.log} is of the protocol {evaluation.protocol!r}, whose figures cannot be computed from "
            f"rows; those of {', '.join(FIGURES)} can. Evaluate the model again instead."
        )
    if evaluation.protocol == "lume":
        refuse_idle(arguments, ["retrained_log"], "on a log of lume, which compares with no retrained model")
    figures, utility = FIGURES[evaluation.protocol]
    evaluation.figures = figures(evaluation, retrained)
    return Protocol(evaluation.protocol, {}, figures, utility), [evaluation], retrained


def _load(arguments: EvalArguments, adapter: LoraAdapter | None, output_dir: Path) -> Evaluator:
    quantization = arguments.quantization_config
    reference = None
    if arguments.reference_model is not None:
        folder = resolve_model(arguments.reference_model)
        reference = load_causal_lm(folder, arguments.dtype, quantization)
    if adapter is None:
        folder = resolve_model(arguments.model)
        tokenizer = load_tokenizer(folder)
        model = load_causal_lm(folder, arguments.dtype, quantization)
    else:
        base = base_of(adapter, arguments.base)
        model, tokenizer = load_with_adapter(base, adapter, arguments.dtype, arguments.check_base, quantization)
    return arguments.make_evaluator(model, tokenizer, output_dir, reference)


def _plan(arguments: EvalArguments, adapter: LoraAdapter | None) -> str:
    """What a run would do; everything is loaded but the weights."""
    if adapter is not None:
        base = base_of(adapter, arguments.base)
        source = verified_checkpoint(base, adapter, arguments.check_base).folder
        at = "as it is" if adapter.is_result else f"at α = 0 and {parse_alphas(arguments.alphas)}"
        what = f"{base} with {adapter.id} {at}"
    else:
        source, what = resolve_model(arguments.model), arguments.model
    protocol = arguments.check_protocol(load_tokenizer(source))
    files = ", ".join(f"{arguments.output_dir}/{name}" for name in OUTPUTS)
    return f"Would evaluate {what} under {describe_rows(protocol)}.\nwrites: {files}"
