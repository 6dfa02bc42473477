"""
The forget model in memory: by rescaling the live adapter, which touches only Python floats, or as a state dict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedTokenizerBase

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter
from hf_unlearn.extrapolation.arithmetic import (
    RealisedError,
    check_alpha,
    extrapolate_weight,
    lora_delta,
    parse_dtype,
)
from hf_unlearn.extrapolation.checkpoint import atomic_folder
from hf_unlearn.extrapolation.fingerprint import is_quantised
from hf_unlearn.extrapolation.linearity import check_lora_config
from hf_unlearn.extrapolation.model_config import set_config_dtype
from hf_unlearn.extrapolation.provenance import write_provenance


MAX_SHARD_SIZE = "50GB"  # the default of transformers' `save_pretrained`


@contextmanager
def adapter_scale(model: nn.Module, scale: float | torch.Tensor) -> Iterator[None]:
    """
    Run the model with its active adapters at `scale` times their trained scale; 1 is theta_mem, `-alpha` theta_for.

    The scale is absolute: nested contexts do not multiply. The previous scales come back at the end, also after an
    exception.

    Args:
        model (`torch.nn.Module`): A model with LoRA layers, wrapped or not.
        scale (`float` or `torch.Tensor` of shape `(batch, length)`): Factor of the trained scale; a tensor gives each
            token of a batch a factor of its own, also in layers that get the tokens of all rows in one line.
    """
    if not torch.isfinite(torch.as_tensor(scale)).all():
        raise UnlearningError(f"`scale` must be a finite number, got {scale}.")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise UnlearningError("The model has no LoRA layer to scale. Load the adapter with `peft.PeftModel` first.")
    if any(layer.merged for layer in layers):
        raise UnlearningError("The adapter is merged into the base, so its scale has no effect. Unmerge it first.")
    of_tokens = scale if isinstance(scale, torch.Tensor) else None
    previous = [(dict(layer.scaling), getattr(layer, "scale_of_tokens", None)) for layer in layers]
    hooks: list[RemovableHandle] = []
    try:
        for layer in layers:
            layer.scale_of_tokens = of_tokens
            if of_tokens is not None:
                hooks.append(layer.register_forward_pre_hook(_scale_tokens))
                continue
            for adapter in layer.active_adapters:
                layer.set_scale(adapter, scale)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, (scaling, scale_before) in zip(layers, previous, strict=True):
            layer.scaling.update(scaling)
            layer.scale_of_tokens = scale_before


def _scale_tokens(layer: LoraLayer, args: tuple[torch.Tensor, ...]) -> None:
    """Give a layer, before its forward, the factors of the tokens that it gets."""
    scale = layer.scale_of_tokens
    # In an inner context all tokens have one scale; the reference may be asked about some of the rows.
    if scale is None or layer.disable_adapters:
        return
    tokens = args[0].shape[:-1]
    if tokens != scale.shape and tokens != (scale.numel(),):
        raise UnlearningError(
            f"A {type(layer.get_base_layer()).__name__} with an adapter gets {tuple(tokens)} tokens of a batch of "
            f"{tuple(scale.shape)}, so it is not known which belong to the retain rows. Leave the module out of "
            "`target_modules`, or set `retain_kl_scale` to 1."
        )
    for adapter in layer.active_adapters:
        layer.set_scale(adapter, scale.reshape(*tokens, 1))


def check_tokens_in_order(model: nn.Module) -> None:
    """Raise if an adapter is on an expert that gets some tokens of a batch only: which, its input does not say."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and re.search(r"\.experts\.\d+\.", name):
            raise UnlearningError(
                f"The adapter on {name!r} gets the tokens that a router sends there, so it is not known which belong to "
                "the retain rows. Leave the experts out of `target_modules`, or set `retain_kl_scale` to 1."
            )


@contextmanager
def extrapolated(model: nn.Module, alpha: float) -> Iterator[None]:
    """
    Run the model as theta_ref - alpha * s * B @ A, in eval mode; training flags and scales come back at the end.

    Args:
        model (`torch.nn.Module`): A model with LoRA layers.
        alpha (`float`): The extrapolation factor; 0 is the reference.
    """
    if alpha != 0:
        alpha = check_alpha(alpha)
    training = {module: module.training for module in model.modules()}
    with adapter_scale(model, -alpha):
        model.eval()
        try:
            yield
        finally:
            for module, flag in training.items():
                module.training = flag


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the weights only, as under ZeRO-3 and FSDP2."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def check_live_adapter(model: nn.Module) -> str:
    """The name of the adapter of `model`; raise unless it is one plain LoRA that can be merged into the live base."""
    if not isinstance(model, PeftModel) or len(model.active_adapters) != 1:
        raise UnlearningError("`model` must be a `peft.PeftModel` with one active adapter. Set it with `set_adapter`.")
    if is_quantised(model):
        raise UnlearningError(
            "The base model is quantised: adding the update would need it quantised again. Save the forget adapter "
            "with `save_forget_adapter`, or merge into the 16- or 32-bit base with `extrapolate`."
        )
    adapter = model.active_adapters[0]
    check_lora_config(model.peft_config[adapter])
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module, LoraLinear):
            raise UnlearningError(
                f"The adapter on {name!r} is a {type(module).__name__}: only those on linear layers can be merged. "
                "Leave the module out of `target_modules`."
            )
        if module.merged:
            raise UnlearningError(f"The adapter on {name!r} is merged into the base already. Unmerge it first.")
    return adapter


@torch.no_grad()
def merged_state_dict(
    model: PeftModel, alpha: float, dtype: torch.dtype | None = None
) -> tuple[dict[str, torch.Tensor], RealisedError]:
    """
    The state dict of theta_for under the base model's own names. The live weights do not change.

    Args:
        model (`peft.PeftModel`): The model with its memorising adapter.
        alpha (`float`): The extrapolation factor, above 0.
        dtype (`torch.dtype`, *optional*): Dtype of the floating-point tensors; that of the live ones if not given.

    Returns:
        `tuple` of `dict` and `RealisedError`: The tensors (those that did not change share memory with the live
        model, and tied ones with each other), and what the cast cost.
    """
    alpha = check_alpha(alpha)
    adapter = check_live_adapter(model)
    if is_sharded(model):
        raise UnlearningError(
            "The weights are sharded over the processes (ZeRO-3, FSDP2), and a state dict would hold all of them. "
            "Write the model with `ExtrapolationTrainer.save_forget_model`, or save the adapter and merge it with "
            "`extrapolate`."
        )
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    errors = RealisedError()
    casts: dict[tuple[int, torch.Size], torch.Tensor] = {}
    result = {}
    for key, tensor in base.state_dict().items():
        if "lora_" in key:
            continue
        name = key.replace(".base_layer.", ".")
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if layer is not None and adapter in layer.lora_A:
            result[name] = extrapolate_weight(name, tensor, _live_delta(layer, adapter), alpha, target, errors)
        else:
            # one cast per storage, so that tied weights stay tied
            result[name] = casts.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(target))
    errors.refuse_no_op("Train the adapter for longer, choose a larger alpha, or pass `dtype=torch.float32`.")
    return result, errors


def save_live_forget_model(
    model: PeftModel,
    alpha: float,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    adapter: LoraAdapter,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """
    Write theta_for of a live model as a transformers checkpoint, without changing the model.

    Args:
        model (`peft.PeftModel`): The model with its memorising adapter.
        alpha (`float`): The extrapolation factor, above 0.
        output_dir (`str` or `Path`): The folder to write; it appears only once it is complete.
        tokenizer (`PreTrainedTokenizerBase`): Saved beside the weights.
        adapter (`LoraAdapter`): The same adapter as saved, for the record in `unlearning.json`.
        dtype (`str`, *optional*): Output dtype of the floating-point weights; that of the live ones if not given.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest size of a file, as in
            `save_pretrained`.

    Returns:
        `Path`: The folder written.
    """
    target = None if dtype is None else parse_dtype(dtype)
    with atomic_folder(output_dir, overwrite) as folder:
        state, errors = merged_state_dict(model, alpha, target)
        written = target or next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        base = model.get_base_model()
        base.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)  # empties `state`
        set_config_dtype(folder, written)
        tokenizer.save_pretrained(folder)
        write_provenance(
            folder, adapter.forget_provenance("forget-model", alpha, written, errors, adapter.provenance.get("base"))
        )
    return Path(output_dir)


def _live_delta(layer: LoraLinear, adapter: str) -> torch.Tensor:
    """`s * B @ A` at the trained scale, whatever scale the layer runs at now."""
    rank = layer.r[adapter]
    scaling = layer.lora_alpha[adapter] / (math.sqrt(rank) if layer.use_rslora[adapter] else rank)
    return lora_delta(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, scaling, layer.fan_in_fan_out)
