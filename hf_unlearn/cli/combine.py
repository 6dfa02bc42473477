"""`hf-unlearn combine`: several memorising adapters, or one and its data, into one direction to extrapolate along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from hf_unlearn.cli import EXIT_OK
from hf_unlearn.cli.common import (
    DataArguments,
    alone_in,
    base_of,
    load_tokenizer,
    load_with_adapter,
    refuse_existing,
    refuse_idle,
    verified_checkpoint,
)
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.terminal import console, json_output, print_plan
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import (
    LoraAdapter,
    LowRankUpdate,
    RealisedError,
    SignConsensus,
    average,
    extrapolate,
    fisher_factors,
    layer_fisher,
    momentum,
    plan_merge,
    project,
    run_checkpoints,
    scale_layers,
    subtract,
    truncate,
)
from hf_unlearn.extrapolation.adapter import refuse_overwriting
from hf_unlearn.extrapolation.arithmetic import check_alpha, parse_dtype
from hf_unlearn.extrapolation.operators import DEFAULT_ETA


MAX_COSINES = 5  # columns that fit a terminal
SETS = tuple(f"{name}_{part}" for name in ("forget", "retain") for part in ("dataset", "config", "split"))
OPTIONS = {  # operator: the options that have an effect, besides those of all
    "average": (),
    "momentum": ("eta",),
    "projection": ("retain_adapter",),
    "consensus": ("base", "alpha", "dtype"),
    "fisher": ("base", "dtype", *SETS),
    "retain_vector": ("retain_adapter", "weight"),
    "targeted": ("target_adapter", "weight"),
}
REQUIRED = ("retain_adapter", "target_adapter", "forget_dataset", "retain_dataset")
NUM_ADAPTERS = {"average": (2, None), "momentum": (1, None), "consensus": (2, None)}  # one each for the others

DESCRIPTION = """\
Make one direction ΔW out of memorising adapters, to be extrapolated along like that of one adapter:

  average        the mean of several adapters: noise that differs from seed to seed averages out
  momentum       the moving average of the checkpoints of one run, the newest with weight η
  projection     ΔW without what a retain adapter shares with it, row by row
  consensus      only the entries whose sign all adapters agree on, averaged; the others 0
  fisher         one α per module: large where forget rows pull and retain rows do not
  retain_vector  ΔW − ρ·ΔW_retain: away from the forget set and towards the retain set
  targeted       ΔW − ρ·ΔW_target: away from the old answers and towards new ones

The result is an ordinary memorising adapter, for `sweep`, `eval` and `extrapolate` at any α; keep it as private as its
sources. Only consensus has no factors: it writes the forget model at one --alpha, or an adapter of --rank."""

EXAMPLE = """\
  hf-unlearn combine --operator average --adapters seed-0 seed-1 seed-2 --output_dir averaged
  hf-unlearn combine --operator momentum --adapters run --output_dir smoothed --rank 32
  hf-unlearn combine --operator projection --adapters run --retain_adapter retain-run --output_dir projected
  hf-unlearn combine --operator consensus --adapters seed-0 seed-1 seed-2 --alpha 2 --output_dir forget-model"""


@dataclass
class CombineArguments(DataArguments):
    """
    Options of `hf-unlearn combine`.

    Args:
        operator (`str`): How the adapters become one direction.
        adapters (list of `str`): Memorising adapters.
        retain_adapter (`str`, *optional*): Adapter trained on the retain set.
        target_adapter (`str`, *optional*): Adapter trained on target answers.
        weight (`float`, *optional*, defaults to `1.0`): Weight ρ of the retain or target adapter.
        eta (`float`, *optional*, defaults to `0.675`): Weight η of the newest checkpoint.
        rank (`int`, *optional*): Rank to truncate to.
        output_dir (`str`): Folder to write.
        base (`str`, *optional*): Base model.
        alpha (`float`, *optional*): Extrapolation strength.
        dtype (`str`, *optional*): Dtype of the model.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check only.
    """

    operator: str | None = field(
        default=None, metadata={"help": "How the adapters become one direction; see above.", "choices": list(OPTIONS)}
    )
    adapters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Memorising adapters of one base: two or more for average and consensus, the folder of a run (or "
            "its checkpoints in order) for momentum, one for the others."
        },
    )
    retain_adapter: str | None = field(
        default=None,
        metadata={"help": "Adapter of the same base trained on the retain set (projection, retain_vector)."},
    )
    target_adapter: str | None = field(
        default=None,
        metadata={"help": "Adapter of the same base trained on the answers to give instead (targeted)."},
    )
    weight: float = field(
        default=1.0,
        metadata={"help": "Weight ρ of that adapter, above 0: it is added with β = ρ·α (retain_vector, targeted)."},
    )
    eta: float = field(
        default=DEFAULT_ETA, metadata={"help": "Weight η of the newest checkpoint, above 0 and below 1 (momentum)."}
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "Truncate to this rank, by SVD; the error is printed and recorded. Exact if not given."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write; it appears once it is whole."})
    base: str | None = field(
        default=None,
        metadata={
            "help": "Base model, the one the first adapter names if not given (fisher, and consensus without --rank)."
        },
    )
    alpha: float | None = field(
        default=None, metadata={"help": "Strength α of the forget model that consensus writes without --rank."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "float32, bfloat16 or float16: of the forget model (consensus; the base's if not given), or in which "
            "the base is loaded (fisher; float32 if not given).",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it exists."})
    dry_run: bool = field(
        default=False, metadata={"help": "Check all but the weights of the base, print the table, write nothing."}
    )


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("combine", [CombineArguments], DESCRIPTION, EXAMPLE).parse(argv)
    _check(arguments)
    folder = Path(arguments.output_dir).expanduser()
    refuse_existing(folder, arguments.overwrite)
    with alone_in(folder, arguments.dry_run):
        return _write(arguments, folder)


def _write(arguments: CombineArguments, folder: Path) -> int:
    """Combine, print and write; the exit code."""
    sources = _sources(arguments)
    refuse_overwriting(folder, *(source.folder for source in sources))
    update = _combine(arguments, sources)
    if isinstance(update, SignConsensus) and arguments.rank is None:
        return _write_model(arguments, update)
    errors = None
    if arguments.rank is not None and not arguments.dry_run:
        update, errors = truncate(update, arguments.rank)
    unknown = arguments.dry_run and arguments.operator == "fisher"
    _show(sources, None if unknown else update)
    if arguments.dry_run:
        rank = f", truncated to rank {arguments.rank}," if arguments.rank is not None else ""
        print_plan(
            f"Would write a memorising adapter{rank} to {folder}: adapter_model.safetensors, adapter_config.json, "
            "unlearning.json, README.md"
        )
        return EXIT_OK
    if errors is not None:
        console.print(_truncation(arguments.rank, errors))
        worst = {"worst_error": errors.worst_relative, "worst_tensor": errors.worst_tensor}
        json_output.report(truncation={"rank": arguments.rank, "realised_error": errors.relative} | worst)
    update.save(folder, arguments.overwrite)
    json_output.report(output_dir=folder)
    console.print(
        f"Memorising adapter written to {folder}. Keep it private. Next:\n"
        f"  hf-unlearn sweep --adapter {folder} --forget_dataset FORGET --retain_dataset RETAIN --output_dir "
        f"{folder}-sweep"
    )
    return EXIT_OK


def _check(arguments: CombineArguments) -> None:
    for option in ("operator", "adapters", "output_dir"):
        if not getattr(arguments, option):
            raise UnlearningError(f"--{option} is required. See `hf-unlearn combine --help`.")
    used = OPTIONS[arguments.operator]
    all_options = dict.fromkeys(option for options in OPTIONS.values() for option in options)
    idle = [option for option in all_options if option not in used]
    refuse_idle(arguments, idle, f"with --operator {arguments.operator}")
    for option in REQUIRED:
        if option in used and getattr(arguments, option) is None:
            raise UnlearningError(
                f"--operator {arguments.operator} needs --{option}. See `hf-unlearn combine --help`."
            )
    least, most = NUM_ADAPTERS.get(arguments.operator, (1, 1))
    found = len(arguments.adapters)
    if found < least or (most is not None and found > most):
        wanted = "one" if most else f"{least} or more"
        raise UnlearningError(f"--operator {arguments.operator} takes {wanted} --adapters, got {found}.")
    twice = [name for name in arguments.adapters if arguments.adapters.count(name) > 1]
    if twice:
        raise UnlearningError(f"--adapters names {twice[0]} more than once. Name each adapter once.")
    if arguments.rank is not None and arguments.rank < 1:
        raise UnlearningError(f"--rank {arguments.rank} is not possible. Choose a whole number above 0.")
    if arguments.dtype is not None:
        parse_dtype(arguments.dtype)
    if arguments.operator == "consensus":
        _check_consensus(arguments)


def _check_consensus(arguments: CombineArguments) -> None:
    if arguments.rank is not None:
        refuse_idle(arguments, OPTIONS["consensus"], "with --rank, which writes an adapter for any base and α")
    elif arguments.alpha is None:
        raise UnlearningError(
            "The consensus has no factors, so the forget model is written, and that needs --alpha. Give it, or --rank "
            "to write an adapter that approximates the consensus."
        )
    else:
        check_alpha(arguments.alpha)


def _sources(arguments: CombineArguments) -> list[LoraAdapter]:
    """The adapters that are combined, in the order of the operator."""
    paths = list(arguments.adapters)
    if arguments.operator == "momentum" and len(paths) == 1:
        paths = run_checkpoints(paths[0])
    others = (arguments.retain_adapter, arguments.target_adapter)
    return [LoraAdapter.load(path) for path in [*paths, *(other for other in others if other is not None)]]


def _combine(arguments: CombineArguments, sources: list[LoraAdapter]) -> LowRankUpdate | SignConsensus:
    operator = arguments.operator
    if operator == "consensus":
        return SignConsensus(sources)
    if operator == "average":
        return average(sources)
    if operator == "momentum":
        return momentum(sources, arguments.eta)
    if operator == "projection":
        return project(*sources)
    if operator == "fisher":
        return _scale_by_fisher(arguments, sources[0])
    update = subtract(*sources, arguments.weight)
    update.operator["name"] = operator
    return update


def _scale_by_fisher(arguments: CombineArguments, adapter: LoraAdapter) -> LowRankUpdate:
    adapter.refuse_result()
    sets = {name: arguments.load_required(name) for name in ("forget", "retain")}
    base = base_of(adapter, arguments.base)
    if arguments.dry_run:
        load_tokenizer(verified_checkpoint(base, adapter).folder)
        return LowRankUpdate.of(adapter)
    model, tokenizer = load_with_adapter(base, adapter, arguments.dtype or "float32")
    fisher = {name: layer_fisher(model, rows, tokenizer, name=f"{name} set") for name, rows in sets.items()}
    factors = fisher_factors(adapter, fisher["forget"], fisher["retain"])
    least, most = min(factors, key=factors.get), max(factors, key=factors.get)
    console.print(f"Factors of α: from {factors[least]:.3g} ({least}) to {factors[most]:.3g} ({most}).")
    json_output.report(factors=factors)
    update = scale_layers(adapter, factors)
    update.operator |= {"name": "fisher", "fisher": fisher}
    return update


def _write_model(arguments: CombineArguments, update: SignConsensus) -> int:
    base = base_of(update, arguments.base)
    console.print("The consensus is dense: the forget model is written, in pieces. --rank writes an adapter instead.")
    if arguments.dry_run:
        plan = plan_merge(base, update, arguments.alpha, arguments.output_dir, dtype=arguments.dtype)
        _show(update.sources, None)
        print_plan(
            f"Would write a forget model of {plan.total_bytes / 1e6:,.1f} MB at α = {arguments.alpha:g} to "
            f"{arguments.output_dir}; {len(plan.adapted)} tensors change."
        )
        return EXIT_OK
    report = extrapolate(
        base, update, arguments.alpha, arguments.output_dir, dtype=arguments.dtype, overwrite=arguments.overwrite
    )
    _show(update.sources, update)
    console.print(
        f"Forget model at α = {report.alpha:g} written to {report.output_dir}: {report.adapted_tensors} tensors changed, "
        f"realised error of the update {report.realised_error:.2e} (worst {report.worst_error:.2e} in "
        f"{report.worst_tensor})."
    )
    json_output.report(**report.to_dict())
    return EXIT_OK


def _show(sources: Sequence[LoraAdapter], update: LowRankUpdate | SignConsensus | None) -> None:
    """Print modules, rank, norm and cosines of the adapters and, where it is there, of the result."""
    inputs = [LowRankUpdate.of(source) for source in sources]
    norms = [item.norm for item in inputs]
    headers = ["adapter", "modules", "rank", "‖ΔW‖", *(f"cos {n + 1}" for n in range(min(len(inputs), MAX_COSINES)))]
    table = Table(*(Column(title, justify="right" if n else "left") for n, title in enumerate(headers)), box=None)

    def row(name: str, item: LowRankUpdate, norm: float) -> dict[str, Any]:
        cosines = [
            item.inner(other) / (norm * other_norm) if norm * other_norm > 0 else None
            for other, other_norm in zip(inputs[:MAX_COSINES], norms, strict=False)
        ]
        cells = ["–" if cosine is None else f"{cosine:.3f}" for cosine in cosines]
        table.add_row(name, str(len(item.terms)), _rank_range(item), f"{norm:.4g}", *cells)
        ranks = sorted(set(item.ranks().values()))
        return {"adapter": name, "modules": len(item.terms), "ranks": ranks, "norm": norm, "cosines": cosines}

    adapters = [
        row(f"{number} {Path(source.id).name}", item, norm)
        for number, (source, item, norm) in enumerate(zip(sources, inputs, norms, strict=True), start=1)
    ]
    result = None
    if isinstance(update, SignConsensus):
        norm, agreed = update.measure()
        table.add_row("result", str(len(update.modules)), "dense", f"{norm:.4g}")
        table.caption = f"The adapters agree on {agreed:.1%} of the entries."
        result = {"adapter": "result", "modules": len(update.modules), "norm": norm, "agreed": agreed}
    elif update is not None:
        result = row("result", update, update.norm)
    console.print(table)
    json_output.report(adapters=adapters, result=result)


def _rank_range(update: LowRankUpdate) -> str:
    ranks = sorted(set(update.ranks().values()))
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def _truncation(rank: int, errors: RealisedError) -> str:
    return (
        f"Truncated to rank {rank}: relative error {errors.relative:.2e} (worst {errors.worst_relative:.2e} in "
        f"{errors.worst_tensor})."
    )
