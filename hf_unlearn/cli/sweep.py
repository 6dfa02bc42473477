"""`hf-unlearn sweep`: evaluate one adapter over many α, and choose one by a rule."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Column, Table

from hf_unlearn.cli import EXIT_FAILED, EXIT_OK
from hf_unlearn.cli.common import (
    CommandParser,
    EvaluationDataArguments,
    base_of,
    console,
    load_with_adapter,
    parse_alphas,
    prepare_set,
    refuse_existing,
    verified_checkpoint,
)
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import DEFAULT_GRID, Choice, Sweep, SweepPoint, choose_alpha
from hf_unlearn.evaluation.plots import plot_sweep
from hf_unlearn.evaluation.report import write_report
from hf_unlearn.extrapolation import LoraAdapter, atomic_folder, package_versions


DESCRIPTION = """\
Evaluate θ_for = θ_ref − α·ΔW over a grid of α on one loaded model: the live adapter is rescaled, nothing is merged.
Writes sweep.csv, sweep.json, sweep.png, choice.json and a self-contained report.html."""

EXAMPLE = """\
  hf-unlearn sweep --adapter run --forget_dataset people/forget --retain_dataset people/retain \\
      --holdout_dataset people/holdout --alphas 0.5 1 2 4 --output_dir sweep"""

OUTPUTS = ("report.html", "choice.json", "sweep.csv", "sweep.json", "sweep.png")

SECURITY_NOTE = (
    "Security: the base model together with the forget model or the forget adapter reveals ΔW, and θ_ref + ΔW is the "
    "model that memorised the forget set. Where the base is public, publishing the result publishes the secret."
)


@dataclass
class SweepArguments(EvaluationDataArguments):
    """
    Options of `hf-unlearn sweep`.

    Args:
        adapter (`str`): Memorising adapter.
        base (`str`, *optional*): Base model.
        alphas (list of `float`, *optional*): Grid of α.
        output_dir (`str`): Folder to write.
        min_retain (`float`, *optional*, defaults to `0.95`): Retain budget.
        auc_tolerance (`float`, *optional*, defaults to `0.1`): Tolerance of `match-holdout`.
        refinements (`int`, *optional*, defaults to `4`): Bisection steps after the grid.
        no_generation (`bool`, *optional*, defaults to `False`): Whether to leave generated answers out.
        max_new_tokens (`int`, *optional*, defaults to `64`): Longest generated answer.
        max_length (`int`, *optional*, defaults to `1024`): Longest sequence.
        batch_size (`int`, *optional*, defaults to `16`): Rows in a forward pass.
        dtype (`str`, *optional*, defaults to `"float32"`): Dtype the model is loaded in.
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
    min_retain: float = field(
        default=0.95, metadata={"help": "Share of the mean retain answer probability that α has to keep."}
    )
    auc_tolerance: float = field(
        default=0.1, metadata={"help": "Distance of the membership AUC from 0.5 that counts as not told apart."}
    )
    refinements: int = field(default=4, metadata={"help": "Bisection steps between two α of the grid."})
    no_generation: bool = field(default=False, metadata={"help": "Leave generated answers and ROUGE-L out: faster."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer, in tokens."})
    max_length: int = field(default=1024, metadata={"help": "Longest sequence, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Rows in a forward pass."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype the base model is loaded in.", "choices": ["float32", "bfloat16", "float16"]},
    )
    check_base: bool = field(
        default=True, metadata={"help": "Refuse a base other than the one the adapter was trained on."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it exists."})
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print what would be evaluated."})


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("sweep", [SweepArguments], DESCRIPTION, EXAMPLE).parse(argv)
    for option in ("adapter", "output_dir"):
        if getattr(arguments, option) is None:
            raise UnlearningError(f"--{option} is required. See `hf-unlearn sweep --help`.")
    alphas = parse_alphas(arguments.alphas)
    output_dir = Path(arguments.output_dir)
    refuse_existing(output_dir, arguments.overwrite)
    adapter = LoraAdapter.load(arguments.adapter)
    base = base_of(adapter, arguments.base)
    names = [name for name in ("forget", "retain", "holdout") if getattr(arguments, f"{name}_dataset")]
    rows = {name: arguments.load_required(name) for name in dict.fromkeys(["forget", "retain", *names])}
    if arguments.dry_run:
        counts = ", ".join(f"{len(set_rows)} {name}" for name, set_rows in rows.items())
        checkpoint = verified_checkpoint(base, adapter, arguments.check_base)
        parameters = sum(checkpoint.info(name).numel for name in checkpoint.names())
        weights = parameters * getattr(torch, arguments.dtype).itemsize
        console.print(
            f"Would evaluate {base} with {adapter.id} at α = 0 and {alphas} on {counts} rows, then choose by bisection.\n"
            f"memory: about {weights / 1e9:.2f} GB for the weights, besides Python and its libraries\n"
            f"writes: {', '.join(f'{output_dir}/{name}' for name in OUTPUTS)}"
        )
        return EXIT_OK

    model, tokenizer = load_with_adapter(base, adapter, arguments.dtype, arguments.check_base)
    sets = {
        name: prepare_set(set_rows, f"{name} set", tokenizer, arguments.max_length) for name, set_rows in rows.items()
    }
    sweep = Sweep(model, tokenizer, sets, arguments.batch_size, arguments.max_new_tokens)
    sweep.run(alphas, generate=not arguments.no_generation)
    choice = choose_alpha(sweep, alphas, arguments.min_retain, arguments.auc_tolerance, arguments.refinements)
    if not arguments.no_generation:
        sweep.generate(choice.alpha)
    with atomic_folder(output_dir, arguments.overwrite) as folder:
        facts = {"Base model": base, "Adapter": adapter.id} | package_versions()
        save_sweep(folder, sweep, choice, arguments.min_retain, arguments.auc_tolerance, facts)
    console.print(sweep_table(sweep.points, choice))
    console.print(f"{choice.verdict}\nRule: {choice.rule}.\nWritten to {output_dir}; open {output_dir}/report.html.")
    return EXIT_OK if choice.met else EXIT_FAILED


def save_sweep(
    folder: Path,
    sweep: Sweep,
    choice: Choice,
    min_retain: float,
    auc_tolerance: float,
    facts: dict[str, str],
    log_history: list[dict] | None = None,
    notes: list[str] | None = None,
) -> None:
    """Write everything a sweep yields into `folder`."""
    sweep.save(folder)
    (folder / "choice.json").write_text(json.dumps(choice.to_dict(), indent=2, ensure_ascii=False), encoding="utf-8")
    figure = plot_sweep(sweep.points, choice, min_retain=min_retain, auc_tolerance=auc_tolerance)
    figure.savefig(folder / "sweep.png", dpi=150)
    write_report(
        folder / "report.html",
        title="Unlearning report",
        sweep=sweep,
        choice=choice,
        facts=facts,
        log_history=log_history,
        notes=[*(notes or []), SECURITY_NOTE],
        min_retain=min_retain,
        auc_tolerance=auc_tolerance,
    )


TABLE_COLUMNS = {
    "alpha": "α",
    "forget_probability": "forget\nprob",
    "forget_exact_memorization": "forget\nEM",
    "forget_extraction_strength": "forget\nES",
    "forget_rouge_l": "forget\nROUGE",
    "retain_probability": "retain\nprob",
    "retain_exact_memorization": "retain\nEM",
    "retain_rouge_l": "retain\nROUGE",
    "holdout_probability": "holdout\nprob",
    "membership_auc": "AUC",
}


def sweep_table(points: list[SweepPoint], choice: Choice) -> Table:
    """The main figures of a sweep within 80 columns, the chosen α marked; `sweep.csv` has all of them."""
    summaries = [point.summary() for point in points]
    columns = {name: title for name, title in TABLE_COLUMNS.items() if any(name in summary for summary in summaries)}
    headers = [Column(title, justify="right", no_wrap=True) for title in columns.values()]
    table = Table(*headers, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for summary in summaries:
        chosen = summary["alpha"] == choice.alpha
        cells = [f"{summary[name]:.3f}" if name in summary else "" for name in columns]
        cells[0] = ("* " if chosen else "") + f"{summary['alpha']:.3g}"
        table.add_row(*cells, style="bold" if chosen else None)
    return table
