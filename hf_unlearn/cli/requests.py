"""`hf-unlearn requests`: deletion requests one after another, in a ledger."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_unlearn.cli import EXIT_OK, EXIT_USAGE, train
from hf_unlearn.cli import requests_options as options
from hf_unlearn.cli.common import alone_in, load_causal_lm, load_tokenizer, refuse_existing, refuse_idle
from hf_unlearn.cli.methods import extrapolates, method_of
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.requests_tables import measurement_table, request_lines, requests_table
from hf_unlearn.cli.terminal import console, json_output, print_plan, stderr
from hf_unlearn.data import load_rows
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import parse_batch_size
from hf_unlearn.extrapolation import LoraAdapter, MergeReport, plan_merge, resolve_model
from hf_unlearn.extrapolation.arithmetic import parse_dtype
from hf_unlearn.requests import Ledger, Request
from hf_unlearn.requests.adding import check_before_training
from hf_unlearn.requests.base import check_model
from hf_unlearn.requests.measurement import plan_measurement
from hf_unlearn.requests.storage import WORK_FOLDER
from hf_unlearn.trainer.baselines import METHODS


def run(argv: list[str]) -> int:
    """Run an action and return its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(options.OVERVIEW)
        return EXIT_OK
    action, *rest = argv
    if action not in ACTIONS:
        stderr(f"hf-unlearn requests: unknown action {action!r}. Choose from: {', '.join(ACTIONS)}.")
        return EXIT_USAGE
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnlearningError(
            "A ledger is for one process. Run it without a launcher; `add --accelerate_config` trains in several."
        )
    if rest and not rest[0].startswith("-"):
        rest = ["--id", *rest]
    function, kind, description, example = ACTIONS[action]
    parser = CommandParser(f"requests {action}", [kind], description, example)
    if action == "add" and not {"-h", "--help", "--help_all"} & set(rest):
        return _add(*_split(parser, rest))
    (arguments,) = parser.parse(rest)
    _require(arguments, "ledger")
    return function(Ledger.open(arguments.ledger), arguments)


def _require(arguments: Any, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) is None:
            raise UnlearningError(f"--{name} is required. See `hf-unlearn requests --help`.")


# ---- Adding ----


def _split(parser: CommandParser, argv: list[str]) -> tuple[options.AddArguments, list[str]]:
    """The options of `add`, and the rest, which are options of `train`."""
    arguments, others, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if others.json:
        json_output.start()
    return arguments, [*rest, *(["--config", others.config] if others.config else [])]


def _add(arguments: options.AddArguments, rest: list[str]) -> int:
    _require(arguments, "ledger", "alpha")
    if not arguments.measure:
        refuse_idle(arguments, ["batch_size", "max_shrink"], "without --measure")
    ledger = Ledger.open(arguments.ledger, create=True)
    if arguments.adapter is None:
        return _train_and_add(ledger, arguments, rest)
    if rest:
        raise UnlearningError(f"{' '.join(rest)}: options of training have no effect with --adapter. Leave them out.")
    if not arguments.measure:
        refuse_idle(arguments, ["retain_dataset", "retain_config", "retain_split", "dtype"], "without --measure")
    return _add_adapter(ledger, arguments, LoraAdapter.load(arguments.adapter))


def _add_adapter(ledger: Ledger, arguments: options.AddArguments, adapter: LoraAdapter) -> int:
    names = ("id", "note", "date", "base", "forget_dataset", "forget_config", "forget_split", "keep_rows")
    chosen = {name: getattr(arguments, name) for name in names}
    if arguments.dry_run:
        request = ledger.plan(adapter, arguments.alpha, **chosen)
        print_plan(f"Would add {_what(request)} to {ledger.folder}.")
        return EXIT_OK
    request = ledger.add(adapter, arguments.alpha, **chosen)
    json_output.report(request=request.to_dict())
    console.print(f"Added {_what(request)} to {ledger.folder}. Its adapter is a secret: keep the folder private.")
    if arguments.measure:
        try:
            return _measure(ledger, arguments)
        except UnlearningError as error:
            raise UnlearningError(f"The request {request.id} is added, but could not be measured. {error}") from error
    if len(ledger.active()) > 1:
        command = shlex.join(["hf-unlearn", "requests", "measure", "--ledger", arguments.ledger])
        console.print(f"What it does to the others: {command}", markup=False)
    return EXIT_OK


def _what(request: Request) -> str:
    rows = "an unknown number of" if request.num_rows is None else str(request.num_rows)
    return f"the request {request.id} ({rows} rows, α = {request.alpha:g})"


def _train_and_add(ledger: Ledger, arguments: options.AddArguments, rest: list[str]) -> int:
    work = ledger.folder / WORK_FOLDER / "run"
    argv = _train_argv(ledger, arguments, rest, work)
    method = method_of(argv)
    if not extrapolates(method):
        raise UnlearningError(
            f"--method {method} trains no memorising adapter, which is what a request needs. Leave it out."
        )
    kinds = [train.TrainArguments, METHODS[method][1], train.LoraModelConfig]
    sets, _, model = CommandParser("requests add", kinds, options.ADD, options.ADD_EXAMPLE).parse(argv)
    if model.model_name_or_path is None:
        raise UnlearningError("--model_name_or_path is required for the first request: a Hub id or a local folder.")
    rows = sets.load_required("forget")
    check_before_training(
        ledger, arguments.alpha, arguments.id, arguments.date, rows, model.model_name_or_path, model.model_revision
    )
    arguments = copy.copy(arguments)  # what a --config file says of the sets counts as given
    for name in (f"{kind}_{part}" for kind in ("forget", "retain") for part in ("dataset", "config", "split")):
        setattr(arguments, name, getattr(sets, name))
    if arguments.dry_run:
        code = train.run([*argv, "--dry_run"])
        console.print(f"Would add the adapter to {ledger.folder} as a request, at α = {arguments.alpha:g}.")
        return code
    with ledger.locked():
        code = train.run(argv, says_what_next=False)
        if code != EXIT_OK:
            stderr("The training did not end, so no request was added. To go on after an interruption, use `train`.")
            return code
        adapter = LoraAdapter.load(work)
        adapter.id = f"the adapter trained on {arguments.forget_dataset}"
        return _add_adapter(ledger, arguments, adapter)


def _train_argv(ledger: Ledger, arguments: options.AddArguments, rest: list[str], output_dir: Path) -> list[str]:
    """The command line of `train`."""
    given = {option.partition("=")[0].replace("-", "_") for option in rest}
    for option in ("output_dir", "resume", "overwrite"):
        if f"__{option}" in given:
            raise UnlearningError(f"--{option} has no effect in `add`, which trains in the ledger. Leave it out.")
    names = ("forget_dataset", "forget_config", "forget_split", "retain_dataset", "retain_config", "retain_split")
    argv = [*rest, "--output_dir", str(output_dir)]
    for name in (*names, "dtype"):
        if getattr(arguments, name) is not None:
            argv += [f"--{name}", getattr(arguments, name)]
    if ledger.base is not None and not {"__model_name_or_path", "__config"} & given:
        argv += ["--model_name_or_path", arguments.base or ledger.base["id"]]
        if ledger.base["revision"] and not arguments.base:
            argv += ["--model_revision", ledger.base["revision"]]
    return argv


# ---- Reading and changing ----


def _list(ledger: Ledger, arguments: options.LedgerArguments) -> int:
    console.print(f"Base model: {ledger.base['id']}")
    console.print(requests_table(ledger.requests))
    base = {name: ledger.base[name] for name in ("id", "revision")}
    json_output.report(base=base, requests=[request.to_dict() for request in ledger.requests])
    return EXIT_OK


def _show(ledger: Ledger, arguments: options.RequestArguments) -> int:
    _require(arguments, "id")
    request = ledger[arguments.id]
    console.print(request_lines(request), markup=False)
    json_output.report(**request.to_dict())
    return EXIT_OK


def _revoke(ledger: Ledger, arguments: options.RevokeArguments) -> int:
    _require(arguments, "id", "reason")
    if arguments.dry_run:
        ledger.check_revoke(arguments.id, arguments.reason)
        print_plan(f"Would revoke {arguments.id}.")
        return EXIT_OK
    ledger.revoke(arguments.id, arguments.reason)
    console.print(
        f"Revoked {arguments.id}: {len(ledger.active())} requests are active. Build the model again; earlier builds stay "
        "as they are.\nIts memorising adapter is still in the ledger; `hf-unlearn requests purge` deletes it."
    )
    json_output.report(request=ledger[arguments.id].to_dict())
    return EXIT_OK


def _restore(ledger: Ledger, arguments: options.ChangeArguments) -> int:
    _require(arguments, "id")
    if arguments.dry_run:
        ledger.check_restore(arguments.id)
        print_plan(f"Would restore {arguments.id}.")
        return EXIT_OK
    ledger.restore(arguments.id)
    console.print(f"Restored {arguments.id}.")
    json_output.report(request=ledger[arguments.id].to_dict())
    return EXIT_OK


def _purge(ledger: Ledger, arguments: options.ChangeArguments) -> int:
    _require(arguments, "id")
    what = f"the adapter and the kept rows of {arguments.id}. Copies elsewhere stay, e.g. in backups."
    if arguments.dry_run:
        ledger.check_purge(arguments.id)
        print_plan(f"Would delete {what}")
        return EXIT_OK
    ledger.purge(arguments.id)
    console.print(f"Deleted {what}")
    json_output.report(request=ledger[arguments.id].to_dict())
    return EXIT_OK


# ---- The model ----


def _build(ledger: Ledger, arguments: options.BuildArguments) -> int:
    _require(arguments, "output_dir")
    if arguments.dtype is not None:
        parse_dtype(arguments.dtype)
    refuse_existing(Path(arguments.output_dir).expanduser(), arguments.overwrite)
    chosen = ledger.select(arguments.only, arguments.without)
    what = f"{len(chosen)} of {len(ledger.active())} active requests ({', '.join(request.id for request in chosen)})"
    if arguments.dry_run:
        return _plan_build(ledger, arguments, chosen, what)
    with alone_in(arguments.output_dir):
        written = ledger.build(
            arguments.output_dir,
            format=arguments.format,
            only=arguments.only,
            without=arguments.without,
            base=arguments.base,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
        )
    json_output.report(requests=[request.id for request in chosen])
    if isinstance(written, MergeReport):
        json_output.report(**written.to_dict())
        console.print(
            f"Model that forgets {what} written to {written.output_dir}: {written.adapted_tensors} tensors changed, realised "
            f"error of the update {written.realised_error:.2e} (worst {written.worst_error:.2e} in "
            f"{written.worst_tensor})."
        )
    else:
        json_output.report(output_dir=written)
        console.print(f"Adapter that forgets {what} written to {written}. PEFT loads it on the base as it is.")
    return EXIT_OK


def _plan_build(ledger: Ledger, arguments: options.BuildArguments, chosen: list[Request], what: str) -> int:
    update = ledger.combined(arguments.only, arguments.without)
    detail = f"rank up to {max(update.ranks().values())}"
    if arguments.format == "model":
        base, revision = arguments.base or ledger.base["id"], None if arguments.base else ledger.base["revision"]
        plans = [
            plan_merge(
                base, ledger.adapter(request.id), 1.0, arguments.output_dir, revision=revision, dtype=arguments.dtype
            )
            for request in chosen
        ]
        changed = {tensor for plan in plans for tensor in plan.adapted}
        detail = f"{len(changed)} tensors change, {plans[0].total_bytes / 1e6:,.1f} MB"
    print_plan(f"Would write one {arguments.format} that forgets {what} to {arguments.output_dir}: {detail}.")
    return EXIT_OK


def _measure(ledger: Ledger, arguments: options.MeasureArguments) -> int:
    batch_size = parse_batch_size(arguments.batch_size, "--batch_size")
    dtype = arguments.dtype or "float32"
    parse_dtype(dtype)
    retain = None
    if arguments.retain_dataset is not None:
        config, split = arguments.retain_config, arguments.retain_split
        retain = load_rows(arguments.retain_dataset, config=config, split=split, name="retain set")
    plan, rows = plan_measurement(ledger, arguments.max_shrink, retain is not None)
    base, revision = arguments.base or ledger.base["id"], None if arguments.base else ledger.base["revision"]
    check_model(ledger.base, base, revision)
    if arguments.dry_run:
        counts = [f"{len(content)} rows of {id}" for id, content in rows.items()]
        counts += [f"{len(retain)} retain rows"] if retain else []
        print_plan(f"Would measure {', '.join(counts)} on {base}.")
        for id, reason in plan.not_measured.items():
            console.print(f"Not measured: {id}. {reason}", markup=False)
        json_output.report(not_measured=plan.not_measured)
        return EXIT_OK
    folder = resolve_model(base, revision)
    measurement = ledger.measure(
        load_causal_lm(folder, dtype),
        load_tokenizer(folder),
        retain_dataset=retain,
        max_shrink=arguments.max_shrink,
        batch_size=batch_size,
    )
    console.print(measurement_table(measurement, ledger))
    for id, reason in measurement.not_measured.items():
        console.print(f"Not measured: {id}. {reason}", markup=False)
    for finding in measurement.findings() or [f"Nothing has lost more than {arguments.max_shrink:.0%}."]:
        console.print(finding, markup=False)
    json_output.report(measurement=measurement.to_dict())
    return EXIT_OK


ACTIONS: dict[str, tuple[Callable | None, type, str, str]] = {
    "add": (None, options.AddArguments, options.ADD, options.ADD_EXAMPLE),
    "list": (_list, options.LedgerArguments, options.LIST, options.LIST_EXAMPLE),
    "show": (_show, options.RequestArguments, options.SHOW, options.SHOW_EXAMPLE),
    "revoke": (_revoke, options.RevokeArguments, options.REVOKE, options.REVOKE_EXAMPLE),
    "restore": (_restore, options.ChangeArguments, options.RESTORE, options.RESTORE_EXAMPLE),
    "purge": (_purge, options.ChangeArguments, options.PURGE, options.PURGE_EXAMPLE),
    "build": (_build, options.BuildArguments, options.BUILD, options.BUILD_EXAMPLE),
    "measure": (_measure, options.MeasureArguments, options.MEASURE, options.MEASURE_EXAMPLE),
}
