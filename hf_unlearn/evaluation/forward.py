"""Forward passes through any causal LM, continued from a cache where that saves work."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.evaluation.lockstep import Lockstep
from hf_unlearn.lm_head import LMHead


MIN_SHARED = 8  # tokens; for fewer, a forward pass of their own does not pay


def causal_lm_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal LM itself, with LoRA layers injected or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's EOS and those of the model's generation config."""
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in [tokenizer.eos_token_id, *of_model] if token is not None})


def keeps_state(model: PreTrainedModel) -> bool:
    """Whether the model carries a state (Mamba, convolutions, hybrids), which cannot be shared between answers."""
    return bool(getattr(model, "_is_stateful", False)) or any(DynamicCache(config=model.config).is_linear)


class Backbone:
    """
    The forward passes of a causal LM, up to its last hidden states, and the head that follows.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal LM, used as it stands.

    Attributes:
        lm (`PreTrainedModel`): The causal LM itself.
        lockstep (`Lockstep` or `None`): The context in which to use all else where weights are sharded (ZeRO-3, FSDP2).
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.lm = causal_lm_of(model)
        self.lockstep = Lockstep.of(model, self.lm)

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self.lm.get_input_embeddings().weight.device if self.lockstep is None else self.lockstep.device

    @property
    def head(self) -> LMHead:
        """The LM head, with all of its weights."""
        return LMHead.of(self.lm) if self.lockstep is None else self.lockstep.head

    def hidden_states(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """
        Last hidden states, shape `(B, T, H)`.

        Args:
            ids (`torch.Tensor` of shape `(B, T)`): Token ids, padded on either side.
            mask (`torch.Tensor` of shape `(B, C + T)`): 1 for tokens, 0 for padding, over cache and ids.
            cache (`DynamicCache`, *optional*): Keys and values of the `C` positions before; extended in place.
        """
        parameters = inspect.signature(self.lm.base_model.forward).parameters
        cache_name = (
            "cache" if "cache" in parameters else "past_key_values"
        )  # the older name, in models outside the library
        inputs = {"input_ids": ids, "attention_mask": mask, cache_name: cache, "use_cache": cache is not None}
        if "position_ids" in parameters:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self.lockstep is not None:
            return self.lockstep.run(inputs)
        return self.lm.base_model(**inputs).last_hidden_state


def prefill(
    backbone: Backbone, prompts: Sequence[list[int]], cache: DynamicCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute prompts into a cache; what all of them begin with, such as a system turn, is computed once.

    Args:
        backbone ([`Backbone`]): Of a causal LM without a state.
        prompts (sequence of `list[int]`): `B` prompts, each of at least one token.
        cache (`DynamicCache`): An empty cache, filled in place with the keys and values of `C` positions.

    Returns:
        `tuple` of `torch.Tensor`: the last hidden states, shape `(B, 1, H)`, and the mask over the cache, shape `(B, C)`.
    """
    device = backbone.device
    shared = _num_shared(prompts)
    if shared < MIN_SHARED or any(cache.is_sliding):  # the padding after them would push them out of the window
        shared = 0
    else:
        ids, mask = pad([prompts[0][:shared]], "left", device)
        backbone.hidden_states(ids, mask, cache)
        cache.batch_select_indices(torch.zeros(len(prompts), dtype=torch.long, device=device))
    ids, mask = pad([prompt[shared:] for prompt in prompts], "left", device)
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)
    return backbone.hidden_states(ids, mask, cache)[:, -1:], mask


def _num_shared(prompts: Sequence[list[int]]) -> int:
    """How many tokens several prompts begin with alike, leaving at least one of each."""
    if len(prompts) == 1:
        return 0
    shortest = min(map(len, prompts))
    columns = enumerate(zip(*prompts, strict=False))
    return min(shortest - 1, next((index for index, tokens in columns if len(set(tokens)) > 1), shortest))


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
