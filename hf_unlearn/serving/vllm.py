"""
What vLLM asks of a LoRA adapter, checked without vLLM, and the adapter rewritten so that every version serves it.

The rules are those of vLLM's loader (`vllm/lora/peft_helper.py`, `vllm/lora/utils.py`, `vllm/config/lora.py`), as of
version 0.33, and of earlier versions where these are stricter: before they knew `rank_pattern` and `alpha_pattern`, they
ignored them without a word, and every module got the scale of the whole.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from hf_unlearn.extrapolation.checkpoint import SafetensorsFile, resolve_folder
from hf_unlearn.extrapolation.provenance import PROVENANCE_FILE
from hf_unlearn.serving.uniform import load_result, write_uniform


RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of --max-lora-rank
REQUIRED_OPTIONS = ("r", "lora_alpha", "target_modules")
# option: what vLLM says of it
REFUSED_OPTIONS = {
    "modules_to_save": "full copies of modules are not loaded",
    "use_dora": "DoRA is not supported",
    "lora_bias": "a bias beside B is not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "layer_replication": "copied layers are not supported",
    "use_bdlora": "block-diagonal factors are not supported",
    "use_qalora": "QALoRA is not supported",
}
# Other names rewrite the base weights when PEFT loads the adapter.
INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
OTHER_ADAPTER = "Train a plain LoRA adapter, or serve the forget model (`hf-unlearn extrapolate --format model`)."
REWRITE = "`hf-unlearn export --format vllm` mends it."

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class Problem:
    """
    A rule that an adapter breaks.

    Args:
        what (`str`): The option or tensor at fault.
        reason (`str`): Why vLLM does not serve it, or serves it wrongly.
        remedy (`str`): What to do.
        mendable (`bool`, *optional*, defaults to `False`): Whether [`write_servable`] does it.
    """

    what: str
    reason: str
    remedy: str
    mendable: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}. {self.remedy}"


@dataclass(frozen=True)
class ServingReport:
    """
    What [`check_servable`] found.

    Args:
        folder (`Path`): The adapter.
        base (`str`, *optional*): Base model that it names.
        ranks (`tuple` of `int`): Ranks of its modules, each once.
        problems (list of [`Problem`]): Broken rules.
    """

    folder: Path
    base: str | None
    ranks: tuple[int, ...]
    problems: list[Problem]

    @property
    def servable(self) -> bool:
        """Whether vLLM serves it as it is."""
        return not self.problems

    @property
    def max_lora_rank(self) -> int | None:
        """The smallest `--max-lora-rank` that takes the adapter, `None` where there is none."""
        return smallest_rank(max(self.ranks, default=0))

    def command(self, name: str = "forget") -> str:
        """
        The command line that serves the adapter.

        Args:
            name (`str`, *optional*, defaults to `"forget"`): Name of the model in requests.
        """
        options = ["--enable-lora", "--max-lora-rank", str(self.max_lora_rank)]
        modules = ["--lora-modules", f"{name}={self.folder.resolve()}"]
        return shlex.join(["vllm", "serve", self.base or "BASE", *options, *modules])


def smallest_rank(rank: int) -> int | None:
    """The smallest value of `--max-lora-rank` that is no smaller than `rank`, `None` where there is none."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)


def check_servable(adapter: str | Path) -> ServingReport:
    """
    Check the configuration and the header of the weights file of an adapter against the rules of vLLM.

    Which modules vLLM adapts depends on the model and is not checked: linear layers of the models for which vLLM
    supports LoRA.

    Args:
        adapter (`str` or `Path`): Local folder or Hub id.
    """
    folder = resolve_folder(adapter, None, (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PROVENANCE_FILE))
    path = folder / ADAPTER_CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnlearningError(f"{path} cannot be read ({error}). Pass the folder of a saved PEFT adapter.") from error
    if not isinstance(config, dict):
        raise UnlearningError(f"{path} holds a {type(config).__name__}, not a JSON object. Save the adapter again.")
    problems = [*_config_problems(config)]
    ranks: set[int] = set()
    if (folder / ADAPTER_WEIGHTS_FILE).is_file():
        shapes = {name: info.shape for name, info in SafetensorsFile(folder / ADAPTER_WEIGHTS_FILE).tensors.items()}
        modules, others = _module_ranks(shapes)
        ranks = {rank for factors in modules.values() for rank in factors.values()}
        problems += [Problem(name, "it is neither A nor B of a linear layer", OTHER_ADAPTER) for name in others]
        problems += _rank_problems(modules, config)
    else:
        remedy = "Save the adapter again with PEFT, which writes it."
        problems.append(Problem(ADAPTER_WEIGHTS_FILE, "the folder does not hold it", remedy))
    return ServingReport(folder, config.get("base_model_name_or_path"), tuple(sorted(ranks)), problems)


def _config_problems(config: dict[str, Any]) -> Iterator[Problem]:
    if config.get("peft_type", "LORA") != "LORA":
        yield Problem("peft_type", f"{config['peft_type']} is not LoRA", OTHER_ADAPTER)
    for option in REQUIRED_OPTIONS:
        if config.get(option) is None:
            yield Problem(option, "vLLM needs it", f"Save {ADAPTER_CONFIG_FILE} again with PEFT.")
    if config.get("bias", "none") != "none":
        yield Problem("bias", f"{config['bias']!r} trains biases, which are not loaded", OTHER_ADAPTER)
    for option, reason in REFUSED_OPTIONS.items():
        if config.get(option):
            yield Problem(option, reason, OTHER_ADAPTER)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in INITIALISATIONS:
        reason = f"{start!r} changes the base weights when the adapter is loaded"
        yield Problem("init_lora_weights", reason, "Convert it to plain LoRA with PEFT when you save it.")
    for option, whole in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if config.get(option):
            yield Problem(option, f"earlier versions ignore it and take `{whole}` for all modules", REWRITE, True)


def _module_ranks(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Module -> factor (`"A"`, `"B"`) -> rank, and the names of the tensors that are no such factor."""
    modules: dict[str, dict[str, int]] = {}
    others = []
    for name, shape in sorted(shapes.items()):
        match = _FACTOR.fullmatch(name)
        if match is None or len(shape) != 2:
            others.append(name)
        else:
            modules.setdefault(match["module"], {})[match["factor"]] = shape["AB".index(match["factor"])]
    return modules, others


def _rank_problems(modules: dict[str, dict[str, int]], config: dict[str, Any]) -> Iterator[Problem]:
    for module, factors in modules.items():
        if factors.keys() != {"A", "B"} or factors["A"] != factors["B"]:
            yield Problem(module, "A and B do not fit together", "The file is incomplete: save the adapter again.")
    ranks = sorted({rank for factors in modules.values() for rank in factors.values()})
    if not modules:
        yield Problem(ADAPTER_WEIGHTS_FILE, "it holds no factors of LoRA", "Save the adapter again with PEFT.")
    if ranks not in ([], [config.get("r")]) and not config.get("rank_pattern"):
        reason = f"the factors have rank {', '.join(map(str, ranks))}, the configuration says {config.get('r')}"
        yield Problem("r", reason, "Weights and configuration are of different adapters: save them again.")
    if ranks and smallest_rank(ranks[-1]) is None:
        yield Problem("r", f"rank {ranks[-1]} is above {RANKS[-1]}, the largest --max-lora-rank", OTHER_ADAPTER)


def write_servable(adapter: str | Path, output_dir: str | Path, overwrite: bool = False) -> ServingReport:
    """
    Write a forget adapter as vLLM serves it: plain LoRA, one rank out of those of `--max-lora-rank`, one scale.

    Args:
        adapter (`str` or `Path`): Forget adapter: local folder or Hub id.
        output_dir (`str` or `Path`): The folder to write.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.

    Returns:
        [`ServingReport`]: Of the adapter written; it has no problems.
    """
    report = check_servable(adapter)
    refuse_unmendable(report)
    rewritten = write_uniform(load_result(adapter), output_dir, report.max_lora_rank, overwrite)
    return check_servable(rewritten.folder)


def refuse_unmendable(report: ServingReport) -> None:
    """Raise with all problems that rewriting the adapter does not mend."""
    rest = [problem for problem in report.problems if not problem.mendable]
    if rest:
        raise UnlearningError(f"vLLM cannot serve {report.folder}:\n" + "\n".join(f"  {problem}" for problem in rest))
