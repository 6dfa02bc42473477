"""`hf-unlearn export`: the forget adapter or the forget model as vLLM and llama.cpp load them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from hf_unlearn.cli import EXIT_OK
from hf_unlearn.cli.common import alone_in, base_of, refuse_existing, refuse_idle
from hf_unlearn.cli.outputs import SECURITY_NOTE
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.terminal import console, json_output, print_plan
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import resolve_model
from hf_unlearn.extrapolation.adapter import refuse_overwriting
from hf_unlearn.serving.gguf import (
    ADAPTER_CONVERTER,
    DTYPES,
    MODEL_CONVERTER,
    adapter_base,
    choose_dtype,
    export_gguf,
    export_gguf_adapter,
    find_converter,
)
from hf_unlearn.serving.uniform import load_result
from hf_unlearn.serving.vllm import ServingReport, check_servable, refuse_unmendable, write_servable


OPTIONS = {  # format: the options that have an effect, besides those of all
    "vllm": ("adapter",),
    "gguf": ("model", "converter", "dtype"),
    "gguf-lora": ("adapter", "base", "converter", "dtype"),
}
SERVED_TOO = "The base model is served beside it: requests that name the base are answered by the model that has forgotten nothing."

DESCRIPTION = """\
Write a result of `hf-unlearn extrapolate` as servers load it:

  vllm       the forget adapter with one rank and one scale for all modules, checked against the rules of vLLM
  gguf       the forget model, or any other, as a GGUF file for llama.cpp
  gguf-lora  the forget adapter as a GGUF file, to be loaded over that of the base

GGUF files are written by llama.cpp's own converters, out of a checkout named with --converter. transformers, PEFT and
vLLM load the forget model, and PEFT the forget adapter, without any export."""

EXAMPLE = """\
  hf-unlearn export --format vllm --adapter forget-adapter --output_dir vllm-adapter
  hf-unlearn export --format gguf --model forget-model --converter llama.cpp --output_dir gguf-model
  hf-unlearn export --format gguf-lora --adapter forget-adapter --converter llama.cpp --output_dir gguf-adapter"""


@dataclass
class ExportArguments:
    """
    Options of `hf-unlearn export`.

    Args:
        format (`str`): What to write.
        adapter (`str`, *optional*): Forget adapter.
        model (`str`, *optional*): Model to convert.
        output_dir (`str`): Folder to write.
        base (`str`, *optional*): Base model.
        converter (`str`, *optional*): Checkout of llama.cpp.
        dtype (`str`, *optional*): Dtype of the GGUF file.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing folder.
        dry_run (`bool`, *optional*, defaults to `False`): Whether to check only.
    """

    format: str | None = field(default=None, metadata={"help": "What to write; see above.", "choices": list(OPTIONS)})
    adapter: str | None = field(
        default=None,
        metadata={"help": "Forget adapter: what `hf-unlearn extrapolate --format adapter` wrote, or a Hub id."},
    )
    model: str | None = field(
        default=None, metadata={"help": "Model to convert (gguf): the forget model or another, a folder or a Hub id."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write; it appears once it is whole."})
    base: str | None = field(
        default=None,
        metadata={
            "help": "Base model of the adapter (gguf-lora), of which only the configuration is read; the one it names "
            "if not given."
        },
    )
    converter: str | None = field(
        default=None, metadata={"help": "Checkout of llama.cpp, whose converters are run (gguf, gguf-lora)."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the GGUF file; the model's if not given (gguf), float32 (gguf-lora).",
            "choices": list(DTYPES),
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it exists."})
    dry_run: bool = field(
        default=False, metadata={"help": "Check everything, print what would be written, write nothing."}
    )


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    (arguments,) = CommandParser("export", [ExportArguments], DESCRIPTION, EXAMPLE).parse(argv)
    _check(arguments)
    export = {"vllm": _export_vllm, "gguf": _export_model, "gguf-lora": _export_adapter}[arguments.format]
    with alone_in(arguments.output_dir, arguments.dry_run):
        return export(arguments)


def _check(arguments: ExportArguments) -> None:
    if arguments.format is None:
        raise UnlearningError("--format is required. See `hf-unlearn export --help`.")
    used = OPTIONS[arguments.format]
    all_options = dict.fromkeys(option for options in OPTIONS.values() for option in options)
    refuse_idle(
        arguments, [option for option in all_options if option not in used], f"with --format {arguments.format}"
    )
    for option in (used[0], "output_dir"):
        if getattr(arguments, option) is None:
            raise UnlearningError(f"--format {arguments.format} needs --{option}. See `hf-unlearn export --help`.")
    refuse_existing(Path(arguments.output_dir).expanduser(), arguments.overwrite)


def _export_vllm(arguments: ExportArguments) -> int:
    report = check_servable(arguments.adapter)
    refuse_unmendable(report)
    refuse_overwriting(arguments.output_dir, load_result(arguments.adapter).folder)
    if report.problems:
        console.print(_problems(report))
    json_output.report(problems=[asdict(problem) for problem in report.problems], max_lora_rank=report.max_lora_rank)
    if arguments.dry_run:
        ranks = ", ".join(map(str, report.ranks))
        verdict = "It is served as it is" if report.servable else "It has to be rewritten"
        print_plan(
            f"Rank {ranks}, --max-lora-rank {report.max_lora_rank}. {verdict}.\n"
            f"Would write it with rank {report.max_lora_rank} to {arguments.output_dir}: adapter_model.safetensors, "
            "adapter_config.json, unlearning.json"
        )
        return EXIT_OK
    written = write_servable(arguments.adapter, arguments.output_dir, arguments.overwrite)
    json_output.report(output_dir=written.folder, command=written.command())
    console.print(f"Forget adapter of rank {written.max_lora_rank} written to {written.folder}. Serve it with")
    console.print(f"  {written.command()}", markup=False, highlight=False)
    console.print(f"and send requests with the model name `forget`. {SERVED_TOO}\n{SECURITY_NOTE}")
    return EXIT_OK


def _problems(report: ServingReport) -> Table:
    table = Table("option or tensor", "why", "remedy", title=f"vLLM and {report.folder}")
    for problem in report.problems:
        table.add_row(problem.what, problem.reason, problem.remedy)
    return table


def _export_model(arguments: ExportArguments) -> int:
    if arguments.dry_run:
        script, folder = find_converter(arguments.converter, MODEL_CONVERTER), resolve_model(arguments.model)
        return _print_plan("model.gguf", arguments, choose_dtype(folder, arguments.dtype), script)
    with console.status("Converting"):
        path = export_gguf(
            arguments.model, arguments.output_dir, arguments.converter, arguments.dtype, arguments.overwrite
        )
    json_output.report(file=path, bytes=path.stat().st_size)
    console.print(f"{path} written, {path.stat().st_size / 1e6:,.1f} MB. Serve it with\n  llama-server -m {path}")
    return EXIT_OK


def _export_adapter(arguments: ExportArguments) -> int:
    adapter = load_result(arguments.adapter)
    base, dtype = base_of(adapter, arguments.base), arguments.dtype or "float32"
    if arguments.dry_run:
        script = find_converter(arguments.converter, ADAPTER_CONVERTER)
        return _print_plan("adapter.gguf", arguments, choose_dtype(adapter_base(adapter, base), dtype), script)
    with console.status("Converting"):
        path = export_gguf_adapter(
            adapter, base, arguments.output_dir, arguments.converter, dtype, arguments.overwrite
        )
    json_output.report(file=path, bytes=path.stat().st_size)
    console.print(
        f"{path} written, {path.stat().st_size / 1e6:,.1f} MB. Serve it over the GGUF file of {base} with\n"
        f"  llama-server -m base.gguf --lora {path}\n"
        "A request can set the scale of the adapter, also to 0 or below it, where the forget set comes back. Where the "
        f"clients are not trusted, serve the forget model (--format gguf).\n{SECURITY_NOTE}"
    )
    return EXIT_OK


def _print_plan(file: str, arguments: ExportArguments, dtype: str, script: Path) -> int:
    print_plan(f"Would write {arguments.output_dir}/{file} in {dtype} and unlearning.json, by {script}.")
    return EXIT_OK
