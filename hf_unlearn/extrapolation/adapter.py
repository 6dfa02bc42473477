"""Reading a LoRA adapter from disk, and writing the forget adapter: the same factors with `-alpha` folded into B."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from transformers.utils import logging

from hf_unlearn.errors import UnlearningError, parse_json
from hf_unlearn.extrapolation.arithmetic import RealisedError, check_alpha, lora_delta
from hf_unlearn.extrapolation.checkpoint import SafetensorsFile, atomic_folder, resolve_folder, write_shard
from hf_unlearn.extrapolation.linearity import check_lora_config
from hf_unlearn.extrapolation.provenance import PROVENANCE_FILE, package_versions, read_provenance, write_provenance


logger = logging.get_logger(__name__)

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
FORGET_ADAPTER_KIND = "forget-adapter"

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# State of the training of VeLoRA, no part of the update.
_IGNORED_SUFFIX = ".lora_velora_embed"


@dataclass(frozen=True)
class LoraPair:
    """
    The two factors of one adapted module, read from disk at every access.

    Args:
        file (`SafetensorsFile`): The adapter's weights.
        name_a (`str`): Name of A in the file; shape `(rank, in_features)`.
        name_b (`str`): Name of B in the file; shape `(out_features, rank)`.
        scaling (`float`): The trained scale s.
        fan_in_fan_out (`bool`): Whether the base weight is stored as `(in_features, out_features)`.
    """

    file: SafetensorsFile
    name_a: str
    name_b: str
    scaling: float
    fan_in_fan_out: bool

    @property
    def A(self) -> torch.Tensor:
        """Factor A."""
        return self.file.read(self.name_a)

    @property
    def B(self) -> torch.Tensor:
        """Factor B."""
        return self.file.read(self.name_b)

    @property
    def delta_shape(self) -> tuple[int, int]:
        """Shape of the update in the orientation of the base weight."""
        rows, columns = self.file.tensors[self.name_b].shape[0], self.file.tensors[self.name_a].shape[1]
        return (columns, rows) if self.fan_in_fan_out else (rows, columns)


class LoraAdapter:
    """
    A checked LoRA adapter on disk. Build it with [`LoraAdapter.load`].

    Args:
        id (`str`): The path or Hub id it was loaded from.
        folder (`Path`): The local folder.
        config (`peft.LoraConfig`): Its configuration.
        file (`SafetensorsFile`): Its weights.
        modules (`dict`): Name of each adapted module in the base model -> `LoraPair`.
    """

    def __init__(
        self, id: str, folder: Path, config: LoraConfig, file: SafetensorsFile, modules: dict[str, LoraPair]
    ) -> None:
        self.id = id
        self.folder = folder
        self.config = config
        self.file = file
        self.modules = modules
        self.provenance: dict[str, Any] = read_provenance(folder)
        self.sha256 = _sha256(file.path)
        self._held: tuple[str, torch.Tensor, torch.Tensor] | None = None  # a module and its factors in fp32

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> LoraAdapter:
        """
        Read and check an adapter: its options, the pairing and ranks of its factors, and that all values are finite.

        Args:
            path (`str` or `Path`): Local folder or Hub id.
            revision (`str`, *optional*): Branch, tag or commit on the Hub.
        """
        folder = resolve_folder(path, revision, (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PROVENANCE_FILE))
        config = _read_config(folder)
        check_lora_config(config)
        if not (folder / ADAPTER_WEIGHTS_FILE).is_file():
            raise UnlearningError(
                f"{folder} holds no {ADAPTER_WEIGHTS_FILE} (`.bin` files can run code and are not read). Load the "
                "adapter with PEFT and save it again with `save_pretrained`, which writes safetensors."
            )
        file = SafetensorsFile(folder / ADAPTER_WEIGHTS_FILE)
        modules = _pair_factors(file, config)
        _refuse_non_finite(file)
        return cls(str(path), folder, config, file, modules)

    def delta(self, module: str) -> torch.Tensor:
        """The memorising update `s * B @ A` of `module` in fp32, in the orientation of the base weight."""
        pair = self.modules[module]
        return lora_delta(pair.A, pair.B, pair.scaling, pair.fan_in_fan_out)

    def delta_rows(self, module: str, first: int, last: int) -> torch.Tensor:
        """
        Rows of [`~LoraAdapter.delta`]. The factors of the last module asked for stay in memory.

        Args:
            module (`str`): Name of the module.
            first (`int`): First row, in the orientation of the base weight.
            last (`int`): Last row, exclusive.
        """
        pair, held = self.modules[module], self._held
        if held is None or held[0] != module:
            self._held = held = module, pair.A.float(), pair.B.float()
        _, a, b = held
        factors = (a[:, first:last], b) if pair.fan_in_fan_out else (a, b[first:last])
        return lora_delta(*factors, pair.scaling, pair.fan_in_fan_out)

    def forget_provenance(
        self,
        kind: str,
        alpha: float,
        dtype: torch.dtype,
        errors: RealisedError,
        base: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """
        Content of the `unlearning.json` of a forget model or forget adapter made from this adapter.

        Args:
            kind (`str`): `"forget-model"` or `"forget-adapter"`. A model merged from an adapter that was trained on a
                quantised base is warned of, once.
            alpha (`float`): The extrapolation factor.
            dtype (`torch.dtype`): Dtype of the changed tensors.
            errors (`RealisedError`): What the cast to that dtype cost.
            base (`dict`, *optional*): Id, revision and fingerprint of the base; those the adapter names if not given.
        """
        quantization = self.quantization
        if kind == "forget-model" and quantization:
            logger.warning_once(
                f"{self.id} was trained on a quantised base, and is merged into one that is not: the result differs "
                "from what the training saw and from what was evaluated on the quantised base. Evaluate it as well "
                "(`hf-unlearn sweep` without --load_in_4bit and --load_in_8bit does so before the merge), or write "
                "the forget adapter for the quantised base (`--format adapter`, `save_forget_adapter`)."
            )
        named = {
            "id": self.config.base_model_name_or_path,
            "revision": self.config.revision,
            "fingerprint": None,
        }
        return {
            "method": "model-extrapolation",
            "kind": kind,
            "alpha": alpha,
            "operator": self.provenance.get("operator", "scale"),
            "dtype": str(dtype).removeprefix("torch."),
            "base": {**named, **(base or {})},
            "adapter": {
                "id": self.id,
                "sha256": self.sha256,
                **({"quantization_config": quantization} if quantization else {}),
            },
            "realised_error": errors.to_dict(),
            "versions": package_versions(),
            "data": self.provenance.get("data", {}),
        }

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the base was quantised in training, as a `quantization_config`; `None` where it was not."""
        return (self.provenance.get("base") or {}).get("quantization_config")

    @property
    def is_result(self) -> bool:
        """Whether it is used as it is: a forget adapter, or one that another method than extrapolation has trained."""
        method = self.provenance.get("method", "model-extrapolation")
        return method != "model-extrapolation" or self.provenance.get("kind") == FORGET_ADAPTER_KIND

    def refuse_result(self) -> None:
        """Raise where the adapter is a result already, which an extrapolation would walk away from."""
        if self.is_result:
            forget = self.provenance.get("kind") == FORGET_ADAPTER_KIND
            what = "a forget adapter" if forget else f"by `{self.provenance['method']}`"
            raise UnlearningError(
                f"{self.id} is {what}: it is the result as it stands, and extrapolating would walk away from it. Evaluate "
                "it with `hf-unlearn eval --adapter`, and load it with PEFT, or merge it with its `merge_and_unload`."
            )


def _read_config(folder: Path) -> PeftConfig:
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise UnlearningError(f"{folder} holds no {ADAPTER_CONFIG_FILE}. Pass the folder of a saved PEFT adapter.")
    try:
        content = parse_json((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        config = PeftConfig.from_peft_type(**content)
        for option in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(config, option), str | None):
                raise TypeError(f"`{option}` is no text")
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UnlearningError(
            f"{folder / ADAPTER_CONFIG_FILE} cannot be read: {error}. Save the adapter again with PEFT."
        ) from error
    unknown = sorted(key for key, value in content.items() if value and not hasattr(config, key))
    if unknown and isinstance(config, LoraConfig):  # of any other kind it is refused as such
        raise UnlearningError(
            f"`{unknown[0]}` in {folder / ADAPTER_CONFIG_FILE} is unknown to the installed PEFT, so the update may not "
            "be s * B @ A. Install the PEFT that wrote the adapter, or leave the option at its default."
        )
    return config


def _pair_factors(file: SafetensorsFile, config: LoraConfig) -> dict[str, LoraPair]:
    """Module name -> its two factors; every tensor in the file must be one of a pair."""
    factors: dict[str, dict[str, str]] = {}
    for name in sorted(file.tensors):
        match = _FACTOR.fullmatch(name)
        if match:
            factors.setdefault(match["module"], {})[match["factor"]] = name
        elif not name.endswith(_IGNORED_SUFFIX):
            raise UnlearningError(
                f"{file.path} holds {name!r}, which is neither A nor B of a linear layer, so merging the factors would "
                "lose it. Train without embeddings, the LM head or `save_embedding_layers` in the adapter."
            )
    if not factors:
        raise UnlearningError(f"{file.path} holds no LoRA factors. Save the adapter again with PEFT.")
    return {module: _pair(file, config, module, names) for module, names in factors.items()}


def _pair(file: SafetensorsFile, config: LoraConfig, module: str, names: dict[str, str]) -> LoraPair:
    for factor in "AB":
        if factor not in names:
            raise UnlearningError(
                f"{file.path}: `lora_{factor}` of module {module!r} is missing. The file is incomplete: save the "
                "adapter again."
            )
    rank = _by_pattern(config.rank_pattern, module, config.r)
    shape_a, shape_b = file.tensors[names["A"]].shape, file.tensors[names["B"]].shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != rank or shape_b[1] != rank:
        raise UnlearningError(
            f"{file.path}: module {module!r} has A of shape {shape_a} and B of shape {shape_b}, but the configuration "
            f"says rank {rank} (`r`, `rank_pattern`) of a linear layer. Weights and {ADAPTER_CONFIG_FILE} are from "
            "different adapters: save them again."
        )
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return LoraPair(file, names["A"], names["B"], scaling, config.fan_in_fan_out)


def _by_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value PEFT uses for `module`: that of the first matching key, or the default."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(pattern.keys(), module), default)


def _refuse_non_finite(file: SafetensorsFile) -> None:
    for name in sorted(file.tensors):
        if not torch.isfinite(file.read(name)).all():
            raise UnlearningError(
                f"{file.path}: {name!r} holds NaN or infinite values, which a merge would spread over the model. "
                "The training diverged: train again with a lower learning rate, or take an earlier checkpoint."
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_forget_adapter(
    adapter: LoraAdapter | str | Path, alpha: float, output_dir: str | Path, overwrite: bool = False
) -> Path:
    """
    Write `-alpha * s * B @ A` as a plain PEFT adapter: `-alpha` is folded into B, everything else stays.

    Args:
        adapter (`LoraAdapter`, `str` or `Path`): The memorising adapter.
        alpha (`float`): The extrapolation factor, above 0.
        output_dir (`str` or `Path`): The folder to write.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.

    Returns:
        `Path`: The folder written; it also holds an `unlearning.json`.
    """
    alpha = check_alpha(alpha)
    if not isinstance(adapter, LoraAdapter):
        adapter = LoraAdapter.load(adapter)
    adapter.refuse_result()
    refuse_overwriting(output_dir, adapter.folder)
    errors = RealisedError()
    with atomic_folder(output_dir, overwrite) as folder:
        _write_factors(adapter, alpha, folder / ADAPTER_WEIGHTS_FILE, errors)
        errors.refuse_no_op("Train the adapter for longer, or choose a larger alpha.")
        _plain_config(adapter.config).save_pretrained(str(folder))
        dtype = next(iter(adapter.modules.values())).B.dtype
        base = adapter.provenance.get("base")
        write_provenance(folder, adapter.forget_provenance(FORGET_ADAPTER_KIND, alpha, dtype, errors, base))
    return Path(output_dir)


def _write_factors(adapter: LoraAdapter, alpha: float, path: Path, errors: RealisedError) -> None:
    names_b = {pair.name_b for pair in adapter.modules.values()}
    names = names_b | {pair.name_a for pair in adapter.modules.values()}

    def read(name: str) -> torch.Tensor:
        tensor = adapter.file.read(name)
        if name not in names_b:
            return tensor
        wanted = tensor.float() * -alpha
        realised = wanted.to(tensor.dtype)
        if not torch.isfinite(realised).all():
            raise UnlearningError(f"{name!r} overflows {tensor.dtype} at alpha={alpha}. Use a smaller alpha.")
        errors.add(name, realised.float(), wanted, changed=bool(realised.count_nonzero()))
        return realised

    infos = [adapter.file.tensors[name] for name in names]
    write_shard(path, [(info.name, info.dtype, info.shape, info.nbytes) for info in infos], read)


def _plain_config(config: LoraConfig) -> LoraConfig:
    """The same update as plain LoRA: how A and B were initialised or trained no longer matters."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.init_lora_weights = True
    config.eva_config = None
    config.velora_config = None
    return config


def refuse_overwriting(output_dir: str | Path, *sources: Path) -> None:
    """Raise when the output is one of the folders read from, or holds one."""
    output = Path(output_dir).expanduser().resolve()
    for source in sources:
        if source.resolve().is_relative_to(output):
            raise UnlearningError(
                f"The output folder {output} is or holds {source}, which is read during the merge. Name another."
            )
