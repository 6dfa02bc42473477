"""
Which adapters can be extrapolated.

`theta_ref - alpha * s * B @ A` is only right when the adapter's update is exactly `s * B @ A` on an untouched base
weight. Everything else PEFT's `LoraConfig` offers is refused here, before any training. The table was decided from the
source of PEFT 0.21 (`peft/tuners/lora/{config,layer,variants}.py`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from hf_unlearn.errors import UnlearningError


# option: (reason, remedy)
REFUSED_OPTIONS: dict[str, tuple[str, str]] = {
    "use_dora": (
        "DoRA renormalises every weight, so its update is not linear in alpha",
        "set `use_dora=False`",
    ),
    "modules_to_save": (
        "it trains full copies of modules that no LoRA scale reaches",
        "set `modules_to_save=None`",
    ),
    "trainable_token_indices": (
        "it trains embedding rows outside of the LoRA factors",
        "set `trainable_token_indices=None`",
    ),
    "lora_bias": (
        "it adds a trained bias beside B @ A",
        "set `lora_bias=False`",
    ),
    "layer_replication": (
        "the adapted layers are copies that the base checkpoint does not hold",
        "set `layer_replication=None`",
    ),
    "alora_invocation_tokens": (
        "activated LoRA acts on some tokens only, so no change of the weights equals it",
        "set `alora_invocation_tokens=None`",
    ),
    "use_qalora": (
        "QALoRA pools the input before A, so its update is not B @ A",
        "set `use_qalora=False`",
    ),
    "monteclora_config": (
        "it adds random perturbations to the factors",
        "set `monteclora_config=None`",
    ),
    "use_bdlora": (
        "its factors are block-diagonal and stored in another shape than B and A",
        "set `use_bdlora=None`",
    ),
    "arrow_config": (
        "Arrow routes each token to other adapters, so no change of the weights equals it",
        "set `arrow_config=None`",
    ),
    "kasa_config": (
        "KaSA truncates the base weights and puts a diagonal between B and A",
        "set `kasa_config=None`",
    ),
    "target_parameters": (
        "fused expert weights have other names and layouts in the files than in the live model, and no way of saving "
        "supports them yet",
        "adapt linear layers through `target_modules`",
    ),
    "megatron_config": (
        "the layers are split over Megatron ranks",
        "set `megatron_config=None`",
    ),
}
# VeLoRA approximates only the gradient of A (its forward is that of plain LoRA).
LINEAR_VARIANTS = {"velora_config"}
# Those that leave the base weights alone. EVA, MiCA and "orthogonal" only choose A and B; PiSSA, OLoRA, CorDA, LoftQ
# and LoRA-GA subtract the first B @ A from the base (or quantise it).
LINEAR_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def check_lora_config(config: PeftConfig) -> None:
    """
    Refuse an adapter configuration whose update is not `s * B @ A` on untouched base weights.

    rsLoRA, `rank_pattern`, `alpha_pattern`, `fan_in_fan_out` and VeLoRA are linear and pass.

    Args:
        config (`peft.PeftConfig`): The configuration to check.
    """
    if type(config) is not LoraConfig:
        raise UnlearningError(
            f"`peft_config` is a {type(config).__name__}: only the update of plain LoRA is known to be linear in "
            "alpha. Use a `peft.LoraConfig`."
        )
    if config.bias != "none":
        raise UnlearningError(
            f"`bias={config.bias!r}` trains biases that stay changed when the adapter is off, so the reference would "
            "drift. Set `bias='none'`."
        )
    if config.init_lora_weights not in LINEAR_INITIALISATIONS:
        raise UnlearningError(
            f"`init_lora_weights={config.init_lora_weights!r}` rewrites the base weights, so the model with the "
            "adapter off is no longer the reference. Use True, 'gaussian', 'orthogonal', 'eva' or 'mica'."
        )
    for option, (reason, remedy) in REFUSED_OPTIONS.items():
        if getattr(config, option, None) not in (None, False, [], {}):
            raise UnlearningError(f"`{option}` cannot be extrapolated: {reason}. To go on, {remedy}.")
    _refuse_unknown_variants(config)
    _check_numbers(config)


def _refuse_unknown_variants(config: LoraConfig) -> None:
    """PEFT marks the options that replace plain LoRA: one that is not in the table above comes from a newer PEFT."""
    for field in dataclasses.fields(config):
        is_variant = field.metadata.get("is_lora_variant") and field.name not in LINEAR_VARIANTS
        if is_variant and getattr(config, field.name):
            raise UnlearningError(
                f"`{field.name}` is a LoRA variant that this version does not know to be linear in alpha. "
                f"Leave `{field.name}` at its default."
            )


def _check_numbers(config: LoraConfig) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        try:
            for module in (getattr(config, option) or {}).keys():  # noqa: SIM118 - of a dict alone
                re.compile(module)
        except (AttributeError, TypeError, re.error) as error:
            raise UnlearningError(
                f"`{option}` names no modules: {error}. Its keys are names of modules or regular expressions."
            ) from error
    for name, rank in {"r": config.r, **(config.rank_pattern or {})}.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UnlearningError(f"`r` is {rank!r} for {name!r}. Set a whole number above 0.")
    for option, value in {"lora_alpha": config.lora_alpha, **(config.alpha_pattern or {})}.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UnlearningError(f"`lora_alpha` is {value!r} for {option!r}. Set a finite number above 0.")
        if not value > 0:
            raise UnlearningError(
                f"`lora_alpha` must be positive, but it is {value} for {option!r}: a negative scale would turn "
                "forgetting into memorising. Set a positive `lora_alpha`."
            )


def check_target_modules(model: nn.Module, config: LoraConfig) -> None:
    """
    Refuse targets whose weight is shared or is not that of a hidden layer: embeddings, the LM head, tied weights.

    An update of a tied weight reaches only one of its two uses while the adapter is live and both after the merge, and
    scoring reads the LM head's weight without its adapter.

    Args:
        model (`torch.nn.Module`): The base model, or a `PeftModel` around it.
        config (`peft.LoraConfig`): The configuration whose `target_modules` are checked.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    uses = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    output_head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for name, module in base.named_modules():
        if not _is_targeted(config, name):
            continue
        module = getattr(module, "base_layer", module)
        kind = None
        if isinstance(module, nn.Embedding):
            kind = "an embedding layer"
        elif module is output_head or module is getattr(output_head, "base_layer", None):
            kind = "the LM head"
        elif any(uses[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
            kind = "a layer with tied weights"
        if kind:
            raise UnlearningError(
                f"`target_modules` matches {name!r}, {kind}: its adapter cannot be extrapolated and merged safely. "
                f"Leave it out, for example with `exclude_modules=[{name!r}]` or `target_modules='all-linear'`."
            )


def _is_targeted(config: LoraConfig, name: str) -> bool:
    """Whether PEFT would adapt module `name`. Its defaults and 'all-linear' never reach embeddings or the LM head."""
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return False
    return bool(check_target_module_exists(config, name))
