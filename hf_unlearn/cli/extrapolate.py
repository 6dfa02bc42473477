"""`hf-unlearn extrapolate`: write the forget model or the forget adapter at one α."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from hf_unlearn.cli import EXIT_OK
from hf_unlearn.cli.common import alone_in, base_of, refuse_existing, refuse_idle
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.push import upload
from hf_unlearn.cli.terminal import console, json_output, print_plan
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import LoraAdapter, MergePlan, extrapolate, plan_merge, save_forget_adapter
from hf_unlearn.extrapolation.arithmetic import check_alpha
from hf_unlearn.hub import HubPush, HubRepository
from hf_unlearn.hub.contents import base_on_hub


DESCRIPTION = """\
Write θ_for = θ_ref − α·ΔW from a base model and a memorising adapter: as a whole model, streamed in pieces so that the
model never is in memory, or as a plain LoRA adapter that PEFT loads without this package. A base on the Hub is
downloaded one weights file at a time, after everything has been checked."""

EXAMPLE = """\
  hf-unlearn extrapolate --adapter run --alpha 2 --output_dir forget-model --dtype bfloat16
  hf-unlearn extrapolate --adapter run --alpha 2 --output_dir forget-adapter --format adapter"""


@dataclass
class ExtrapolateArguments:
    """
    Options of `hf-unlearn extrapolate`.

    Args:
        adapter (`str`): Memorising adapter.
        alpha (`float`): Extrapolation strength.
        output_dir (`str`): Folder to write.
        base (`str`, *optional*): Base model.
        base_revision (`str`, *optional*): Its revision on the Hub.
        format (`str`, *optional*, defaults to `"model"`): `"model"` or `"adapter"`.
        dtype (`str`, *optional*): Dtype of the model.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
        check_base (`bool`, *optional*, defaults to `True`): Whether to refuse another base than the recorded one.
        delete_cache (`bool`, *optional*, defaults to `False`): Whether to keep downloads only until they are merged.
        push_to_hub (`bool`, *optional*, defaults to `False`): Whether to upload what was written.
        hub_model_id (`str`, *optional*): Repository to upload to.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check and plan only.
    """

    adapter: str | None = field(
        default=None, metadata={"help": "Memorising adapter: the --output_dir of `hf-unlearn train`, or a Hub id."}
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "Extrapolation strength α, above 0; `hf-unlearn sweep` helps to choose it."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write; it appears once it is whole."})
    base: str | None = field(
        default=None, metadata={"help": "Base model the adapter was trained on; the one it names if not given."}
    )
    base_revision: str | None = field(default=None, metadata={"help": "Revision of the base on the Hub."})
    format: str = field(
        default="model", metadata={"help": "Write a whole model or a LoRA adapter.", "choices": ["model", "adapter"]}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16 or float16; the base's if not given. The error of rounding is recorded."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it exists."})
    check_base: bool = field(
        default=True, metadata={"help": "Refuse a base other than the one the adapter was trained on."}
    )
    delete_cache: bool = field(
        default=False,
        metadata={
            "help": "Keep weights files of a Hub base that are not in the cache yet only until they are merged: the disk "
            "needs room for the result and one of them."
        },
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Upload what was written into a private repository; `hf-unlearn push` has more options."},
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository to upload to, e.g. me/forgetful."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything, print what would be downloaded and written, and what it needs."},
    )


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("extrapolate", [ExtrapolateArguments], DESCRIPTION, EXAMPLE).parse(argv)
    for option in ("adapter", "alpha", "output_dir"):
        if getattr(arguments, option) is None:
            raise UnlearningError(f"--{option} is required. See `hf-unlearn extrapolate --help`.")
    refuse_existing(Path(arguments.output_dir).expanduser(), arguments.overwrite)
    adapter = LoraAdapter.load(arguments.adapter)
    adapter.refuse_result()
    _check_push(arguments, adapter)
    write = _write_adapter if arguments.format == "adapter" else _write_model
    with alone_in(arguments.output_dir, arguments.dry_run):
        write(adapter, arguments)
    if arguments.push_to_hub and not arguments.dry_run:
        upload(HubPush(arguments.hub_model_id, **{arguments.format: arguments.output_dir}))
    return EXIT_OK


def _check_push(arguments: ExtrapolateArguments, adapter: LoraAdapter) -> None:
    """Check what an upload needs before hours of merging."""
    if not arguments.push_to_hub:
        refuse_idle(arguments, ["hub_model_id"], "without --push_to_hub")
        return
    if arguments.hub_model_id is None:
        raise UnlearningError("--push_to_hub needs a repository. Name it with --hub_model_id, e.g. me/forgetful.")
    base_on_hub(adapter.provenance.get("base") or {})
    if not arguments.dry_run:
        HubRepository.check(arguments.hub_model_id)


def _write_adapter(adapter: LoraAdapter, arguments: ExtrapolateArguments) -> None:
    check_alpha(arguments.alpha)
    if arguments.dtype:
        raise UnlearningError("--dtype is for --format model; a forget adapter keeps the dtype of its adapter.")
    idle = ["base", "base_revision", "check_base", "delete_cache"]
    refuse_idle(arguments, idle, "with --format adapter, which needs no base and keeps the one it was trained on")
    if arguments.dry_run:
        size = (adapter.folder / "adapter_model.safetensors").stat().st_size
        print_plan(
            f"Would write a forget adapter at α = {arguments.alpha:g}:\n"
            f"  {arguments.output_dir}/adapter_model.safetensors ({size / 1e6:.1f} MB), adapter_config.json, "
            "unlearning.json"
        )
        return
    folder = save_forget_adapter(adapter, arguments.alpha, arguments.output_dir, overwrite=arguments.overwrite)
    console.print(f"Forget adapter at α = {arguments.alpha:g} written to {folder}. PEFT loads it as it is.")
    json_output.report(alpha=arguments.alpha, output_dir=folder)


def _write_model(adapter: LoraAdapter, arguments: ExtrapolateArguments) -> None:
    base = base_of(adapter, arguments.base)
    options = {
        "revision": arguments.base_revision,
        "dtype": arguments.dtype,
        "check_base": arguments.check_base,
        "delete_cache": arguments.delete_cache,
    }
    if arguments.dry_run:
        plan = plan_merge(base, adapter, arguments.alpha, arguments.output_dir, **options)
        table = Table("file", "bytes", title=f"{arguments.output_dir}, α = {arguments.alpha:g}")
        for name, size in plan.files.items():
            table.add_row(name, f"{size:,}")
        console.print(table)
        console.print(_needs(plan))
        json_output.report(
            dry_run=True,
            alpha=plan.alpha,
            files=plan.files,
            downloads=plan.downloads,
            needed_space=plan.needed_space(),
            peak_memory=plan.peak_memory,
        )
        return
    report = extrapolate(
        base, adapter, arguments.alpha, arguments.output_dir, overwrite=arguments.overwrite, **options
    )
    console.print(
        f"Forget model at α = {report.alpha:g} written to {report.output_dir}: {report.adapted_tensors} tensors changed, "
        f"{report.total_bytes / 1e6:,.0f} MB, realised error of the update {report.realised_error:.2e} "
        f"(worst {report.worst_error:.2e} in {report.worst_tensor})."
    )
    json_output.report(**report.to_dict())


def _needs(plan: MergePlan) -> str:
    """What the merge would change, download and take."""
    space = "; ".join(f"{needed / 1e6:,.1f} MB in {folder}" for folder, needed in plan.needed_space().items())
    return (
        f"{len(plan.adapted)} tensors change.\n"
        f"Download: {plan.download_bytes / 1e6:,.1f} MB in {len(plan.downloads)} files. "
        f"Result: {plan.total_bytes / 1e6:,.1f} MB.\n"
        f"Disk space needed: {space}.\n"
        f"Peak memory: about {plan.peak_memory / 1e6:,.0f} MB besides Python and its libraries."
    )
