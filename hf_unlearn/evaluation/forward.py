"""Forward passes through any causal LM, continued from a cache where that saves work."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel


def causal_lm_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal LM itself, with LoRA layers injected or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the inputs of a model must be."""
    return model.get_input_embeddings().weight.device


def keeps_state(model: PreTrainedModel) -> bool:
    """Whether the model carries a state (Mamba, convolutions, hybrids), which cannot be shared between answers."""
    return bool(getattr(model, "_is_stateful", False)) or any(DynamicCache(config=model.config).is_linear)


def hidden_states(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None = None
) -> torch.Tensor:
    """
    Last hidden states, shape `(B, T, H)`.

    Args:
        model (`PreTrainedModel`): A causal LM.
        ids (`torch.Tensor` of shape `(B, T)`): Token ids, padded on either side.
        mask (`torch.Tensor` of shape `(B, C + T)`): 1 for tokens, 0 for padding, over cache and ids.
        cache (`DynamicCache`, *optional*): Keys and values of the `C` positions before; extended in place.
    """
    parameters = inspect.signature(model.base_model.forward).parameters
    cache_name = (
        "cache" if "cache" in parameters else "past_key_values"
    )  # the older name, in models outside the library
    inputs = {"input_ids": ids, "attention_mask": mask, cache_name: cache, "use_cache": cache is not None}
    if "position_ids" in parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model.base_model(**inputs).last_hidden_state


def pad(sequences: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of shape `(B, T)`, padded on the `"left"` or the `"right"`."""
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, sequence in enumerate(sequences):
        at = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[index, at] = torch.tensor(sequence, dtype=torch.long)
        mask[index, at] = 1
    return ids.to(device), mask.to(device)
