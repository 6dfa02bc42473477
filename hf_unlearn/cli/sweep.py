"""`hf-unlearn sweep`: evaluate one adapter over many α, and choose one by a rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_unlearn.cli import EXIT_FAILED, EXIT_OK
from hf_unlearn.cli.common import (
    alone_in,
    base_of,
    load_tokenizer,
    load_with_adapter,
    parse_alphas,
    refuse_existing,
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
from hf_unlearn.cli.reporting import TOOLS, check_tools, report_curves
from hf_unlearn.cli.terminal import console, json_output, print_plan
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import DEFAULT_GRID, choose_alpha
from hf_unlearn.evaluation.batching import process_state
from hf_unlearn.extrapolation import LoraAdapter, atomic_folder, package_versions


DESCRIPTION = """\
Evaluate θ_for = θ_ref − α·ΔW over a grid of α on one loaded model (the live adapter is rescaled, nothing is merged),
and choose α by a rule: a coarse grid, then bisection. Writes report.html, choice.json, evaluation.json, figures.csv,
rows.csv and evaluation.png. Exits with 1 where the rule is missed."""

EXAMPLE = """\
  hf-unlearn sweep --adapter run --forget_dataset people/forget --retain_dataset people/retain \\
      --holdout_dataset people/holdout --alphas 0.5 1 2 4 --output_dir sweep
  hf-unlearn sweep --adapter run --protocol tofu --split forget10 --retrained_log retain90/TOFU_EVAL.json \\
      --output_dir sweep"""

RULES = ("auto", "match-retrain", "match-holdout", "utility-budget")


@dataclass
class SweepArguments(ProtocolArguments):
    """
    Options of `hf-unlearn sweep`.

    Args:
        adapter (`str`): Memorising adapter.
        base (`str`, *optional*): Base model.
        alphas (list of `float`, *optional*): Grid of α.
        output_dir (`str`): Folder to write.
        rule (`str`, *optional*, defaults to `"auto"`): Rule that chooses α.
        min_utility (`float`, *optional*, defaults to `0.95`): Utility budget.
        auc_tolerance (`float`, *optional*, defaults to `0.1`): Tolerance of `match-holdout`.
        refinements (`int`, *optional*, defaults to `4`): Bisection steps after the grid.
        no_generation (`bool`, *optional*, defaults to `False`): Whether to leave generated answers out.
        report_to (list of `str`, *optional*): Tools to draw the curves over α.
        check_base (`bool`, *optional*, defaults to `True`): Whether to refuse another base than the recorded one.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and plan only.
    """

    adapter: str | None = field(
        default=None, metadata={"help": "Memorising adapter: the --output_dir of `hf-unlearn train`, or a Hub id."}
    )
    base: str | None = field(
        default=None, metadata={"help": "Base model the adapter was trained on; the one it names if not given."}
    )
    alphas: list[float] = field(
        default_factory=lambda: list(DEFAULT_GRID), metadata={"help": "Grid of α, each above 0."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write; it appears once it is whole."})
    rule: str = field(
        default="auto",
        metadata={
            "help": "How α is chosen: match-retrain (needs a retrained log), match-holdout (needs hold-out rows), "
            "utility-budget, or auto, the first of them that the data allow.",
            "choices": RULES,
        },
    )
    min_utility: float = field(
        default=0.95,
        metadata={"help": "Share of the utility that has to remain: of model utility, retain probability, MMLU, ..."},
    )
    auc_tolerance: float = field(
        default=0.1, metadata={"help": "Distance of the membership AUC from 0.5 that counts as not told apart."}
    )
    refinements: int = field(default=4, metadata={"help": "Bisection steps between two α of the grid."})
    no_generation: bool = field(
        default=False, metadata={"help": "Generate answers only where the utility needs them: faster."}
    )
    report_to: list[str] | None = field(
        default=None,
        metadata={"help": "Draw the curves over α in these tools too, at step 1000·α.", "choices": TOOLS},
    )
    check_base: bool = field(
        default=True, metadata={"help": "Refuse a base other than the one the adapter was trained on."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it exists."})
    dry_run: bool = field(
        default=False, metadata={"help": "Check all but the weights, print what would be evaluated."}
    )


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("sweep", [SweepArguments], DESCRIPTION, EXAMPLE).parse(argv)
    for option in ("adapter", "output_dir"):
        if getattr(arguments, option) is None:
            raise UnlearningError(f"--{option} is required. See `hf-unlearn sweep --help`.")
    alphas = parse_alphas(arguments.alphas)
    output_dir = Path(arguments.output_dir).expanduser()
    refuse_existing(output_dir, arguments.overwrite)
    check_tools(arguments.report_to or [])
    adapter = LoraAdapter.load(arguments.adapter)
    adapter.refuse_result()
    base = base_of(adapter, arguments.base)
    if arguments.dry_run:
        print_plan(_plan(arguments, base, adapter, alphas))
        return EXIT_OK
    with alone_in(output_dir):
        return _sweep(arguments, adapter, base, alphas, output_dir)


def _sweep(arguments: SweepArguments, adapter: LoraAdapter, base: str, alphas: list[float], output_dir: Path) -> int:
    """Evaluate, choose and write; the exit code."""
    model, tokenizer = load_with_adapter(
        base, adapter, arguments.dtype, arguments.check_base, arguments.quantization_config
    )
    evaluator = arguments.make_evaluator(model, tokenizer, output_dir)
    choice = choose_alpha(
        evaluator,
        alphas,
        None if arguments.rule == "auto" else arguments.rule,
        arguments.min_utility,
        arguments.auc_tolerance,
        arguments.refinements,
        generate=not arguments.no_generation,
    )
    if not arguments.no_generation:
        tried = {evaluation.alpha for evaluation in evaluator.evaluated()}
        evaluator.run(tried & {*alphas, choice.alpha})  # the steps of the bisection need no answers
    evaluations = evaluator.evaluated()
    if process_state().is_main_process:
        facts = {"Base model": base, "Adapter": adapter.id} | package_versions()
        failures = collapses(evaluations, evaluator.protocol)
        notes = [*failures, SECURITY_NOTE]
        with atomic_folder(output_dir, arguments.overwrite) as folder:
            save_evaluations(folder, evaluator.protocol, evaluations, choice, evaluator.retrained, facts, notes=notes)
            report_curves(arguments.report_to or [], evaluations, folder, run_name=output_dir.name)
        console.print(figures_table(evaluations, choice))
        for failure in failures:
            console.print(failure)
        console.print(
            f"{choice.verdict}\nRule: {choice.rule}.\nWritten to {output_dir}; open {output_dir}/report.html."
        )
        json_output.report(
            evaluations=describe_evaluations(evaluations),
            collapsed=failures,
            choice=choice.to_dict(),
            output_dir=output_dir,
        )
    process_state().wait_for_everyone()
    return EXIT_OK if choice.met else EXIT_FAILED


def _plan(arguments: SweepArguments, base: str, adapter: LoraAdapter, alphas: list[float]) -> str:
    """What a run would do; everything is loaded but the weights."""
    checkpoint = verified_checkpoint(base, adapter, arguments.check_base)
    protocol = arguments.check_protocol(load_tokenizer(checkpoint.folder))
    parameters = sum(checkpoint.info(name).numel for name in checkpoint.names())
    weights = parameters * getattr(torch, arguments.dtype).itemsize
    quantised = " before they are quantised" if arguments.quantization_config is not None else ""
    files = ", ".join(f"{arguments.output_dir}/{name}" for name in (*OUTPUTS, "choice.json"))
    return (
        f"Would evaluate {base} with {adapter.id} at α = 0 and {alphas} under {describe_rows(protocol)}, then "
        f"choose by bisection.\nmemory: about {weights / 1e9:.2f} GB for the weights{quantised}, besides Python and its "
        f"libraries\n"
        f"writes: {files}"
    )
