"""
GGUF files for llama.cpp, written by llama.cpp's own converters.

The names, the order of rows and the metadata of a GGUF file differ from one architecture to the next. The converters
know all of them and come with llama.cpp; they are run as programs, out of a checkout that the user names.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter, refuse_overwriting
from hf_unlearn.extrapolation.checkpoint import SMALL_PATTERNS, atomic_folder, resolve_folder, resolve_model
from hf_unlearn.extrapolation.provenance import read_provenance, write_provenance
from hf_unlearn.serving.uniform import load_result, write_uniform


MODEL_CONVERTER = "convert_hf_to_gguf.py"
ADAPTER_CONVERTER = "convert_lora_to_gguf.py"
MODEL_FILE = "model.gguf"
ADAPTER_FILE = "adapter.gguf"
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}  # ours: the converter's
MAGIC = b"GGUF"
SHOWN_LINES = 12

_MISSING = re.compile(r"ModuleNotFoundError: No module named '(?P<package>[\w.]+)'")

HOW_TO_GET_IT = """\
llama.cpp's converters are Python files of its repository, in no package of their own. Get them with
  git clone --depth 1 https://github.com/ggml-org/llama.cpp
and pass --converter llama.cpp, or, without git, out of the source archive of a package that holds them (nothing is built):
  pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
  tar xzf llama_cpp_python-0.3.36.tar.gz
and pass --converter llama_cpp_python-0.3.36/vendor/llama.cpp. They need `pip install sentencepiece` besides this package."""


def find_converter(folder: str | Path | None, script: str) -> Path:
    """
    The converter in a checkout of llama.cpp.

    Args:
        folder (`str` or `Path`, *optional*): The checkout. Without it the error says how to get one.
        script (`str`): `MODEL_CONVERTER` or `ADAPTER_CONVERTER`.
    """
    if folder is None:
        raise UnlearningError(f"--converter is required: a checkout of llama.cpp.\n{HOW_TO_GET_IT}")
    path = Path(folder).expanduser().resolve() / script
    if not path.is_file():
        raise UnlearningError(
            f"--converter {folder} holds no {script}, so it is no checkout of llama.cpp.\n{HOW_TO_GET_IT}"
        )
    return path


def export_gguf(
    model: str | Path,
    output_dir: str | Path,
    converter: str | Path | None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Write a model as `model.gguf`.

    Args:
        model (`str` or `Path`): The forget model, or any other: local folder or Hub id.
        output_dir (`str` or `Path`): The folder to write; it also holds an `unlearning.json`.
        converter (`str` or `Path`): A checkout of llama.cpp.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"`, `"float16"` or `"q8_0"`; the model's if not given.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.

    Returns:
        `Path`: The GGUF file.
    """
    script, folder = find_converter(converter, MODEL_CONVERTER), resolve_model(model)
    dtype = choose_dtype(folder, dtype)
    refuse_overwriting(output_dir, folder)
    with atomic_folder(output_dir, overwrite) as temporary:
        convert(script, [str(folder.resolve())], temporary / MODEL_FILE, dtype)
        write_provenance(temporary, read_provenance(folder) | {"export": _record(model, dtype)})
    return Path(output_dir).expanduser() / MODEL_FILE


def export_gguf_adapter(
    adapter: str | Path | LoraAdapter,
    base: str | Path,
    output_dir: str | Path,
    converter: str | Path | None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Path:
    """
    Write a forget adapter as `adapter.gguf`, to be loaded over the GGUF file of the base.

    llama.cpp knows one `lora_alpha` and no rsLoRA, and its converter looks for nothing else: the adapter is rewritten
    with one scale first ([`write_uniform`]).

    Args:
        adapter (`str`, `Path` or [`LoraAdapter`]): The forget adapter.
        base (`str` or `Path`): Its base model, local folder or Hub id, of which only the configuration is read.
        output_dir (`str` or `Path`): The folder to write; it also holds an `unlearning.json`.
        converter (`str` or `Path`): A checkout of llama.cpp.
        dtype (`str`, *optional*, defaults to `"float32"`): As in [`export_gguf`].
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.

    Returns:
        `Path`: The GGUF file.
    """
    script = find_converter(converter, ADAPTER_CONVERTER)
    adapter = adapter if isinstance(adapter, LoraAdapter) else load_result(adapter)
    folder = adapter_base(adapter, base)
    dtype = choose_dtype(folder, dtype)
    refuse_overwriting(output_dir, adapter.folder, folder)
    rank = max(adapter.file.tensors[pair.name_a].shape[0] for pair in adapter.modules.values())
    with atomic_folder(output_dir, overwrite) as temporary:
        with TemporaryDirectory(dir=temporary) as work:
            uniform = write_uniform(adapter, Path(work) / "adapter", rank)
            arguments = ["--base", str(folder.resolve()), str(uniform.folder)]
            convert(script, arguments, temporary / ADAPTER_FILE, dtype)
        write_provenance(temporary, adapter.provenance | {"export": _record(adapter.id, dtype)})
    return Path(output_dir).expanduser() / ADAPTER_FILE


def adapter_base(adapter: LoraAdapter, base: str | Path) -> Path:
    """The folder with the configuration of a base model, once it is clear that the adapter can be converted."""
    if adapter.config.fan_in_fan_out:
        raise UnlearningError(
            f"{adapter.id} adapts transposed weights (`fan_in_fan_out`), which llama.cpp's converter would turn round. "
            "Write the forget model (`hf-unlearn extrapolate --format model`), and export that with --format gguf."
        )
    return resolve_folder(base, None, SMALL_PATTERNS)


def read_model_config(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnlearningError(f"{path} cannot be read ({error}). Pass the folder of a transformers model.") from error


def choose_dtype(folder: Path, dtype: str | None) -> str:
    """
    The dtype of a GGUF file.

    Args:
        folder (`Path`): The model.
        dtype (`str`, *optional*): One of `DTYPES`; the one that the model's configuration names if not given.
    """
    config = read_model_config(folder)
    name = dtype or str(config.get("dtype") or config.get("torch_dtype"))
    if name not in DTYPES:
        raise UnlearningError(f"The dtype {name} of {folder} is not possible. Pass --dtype: {', '.join(DTYPES)}.")
    return name


def convert(script: Path, arguments: list[str], output: Path, dtype: str) -> None:
    """
    Run a converter, and raise with its last lines where it fails.

    Args:
        script (`Path`): The converter.
        arguments (list of `str`): What is to be converted.
        output (`Path`): The GGUF file to write.
        dtype (`str`): One of `DTYPES`.
    """
    command = [sys.executable, str(script), *arguments, "--outfile", str(output), "--outtype", DTYPES[dtype]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", done.stdout) if line.strip()]
    if done.returncode or not is_gguf(output):
        missing = _MISSING.search(done.stdout)
        remedy = (
            f"It needs a package: `pip install {missing['package'].partition('.')[0]}`."
            if missing
            else f"If it does not know the model, try a newer llama.cpp; `python {script} --help` shows what it can do."
        )
        tail = "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:])
        raise UnlearningError(
            f"{script.name} of llama.cpp wrote no GGUF file (exit code {done.returncode}). {remedy} Its last lines:\n{tail}"
        )


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _record(source: str | Path, dtype: str) -> dict[str, str]:
    return {"format": "gguf", "source": str(source), "dtype": dtype}
