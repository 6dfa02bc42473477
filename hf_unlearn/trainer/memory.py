"""What a training step will need, estimated from the configuration alone: nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from hf_unlearn.extrapolation.linearity import check_target_modules


HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768  # tile of the chunked LM head
TRAINED_BYTES = 4 + 4 + 8  # weight, gradient and the two moments of AdamW, in fp32


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Peak memory of one process, in bytes, without the interpreter and its libraries.

    Args:
        base_parameters (`int`): Parameters of the base model.
        adapter_parameters (`int`): Parameters that are trained.
        weights (`int`): Base weights.
        adapter (`int`): Adapter weights, gradients and optimizer state.
        activations (`int`): Activations of the gradient forward.
        head (`int`): Tiles of the LM head.
    """

    base_parameters: int
    adapter_parameters: int
    weights: int
    adapter: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.activations + self.head


def estimate_memory(
    config: PretrainedConfig,
    peft_config: LoraConfig,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = True,
) -> MemoryEstimate:
    """
    Estimate the peak memory of a training step.

    Activations are counted as 10 hidden-size and 5 intermediate-size vectors a token and layer (inputs of norms,
    projections and their LoRA factors, gated MLP); with gradient checkpointing as one hidden vector a token and layer
    and the full count for one layer.

    Args:
        config ([`~transformers.PretrainedConfig`]): Configuration of the base model.
        peft_config ([`~peft.LoraConfig`]): Adapter to train.
        rows (`int`): Rows in the gradient forward: forget and retain rows of a micro-batch.
        length (`int`): Their length in tokens.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of weights and activations.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): Whether activations are recomputed.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        base_parameters = model.num_parameters()
        check_target_modules(model, peft_config)
        model = get_peft_model(model, peft_config)
    adapter_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = config.get_text_config()
    width = dtype.itemsize
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    per_layer = rows * length * (10 * text.hidden_size + 5 * intermediate) * width
    layers = text.num_hidden_layers
    if gradient_checkpointing:
        activations = per_layer + layers * rows * length * text.hidden_size * width
    else:
        activations = layers * per_layer
    tile = min(rows * length, HEAD_TOKENS) * min(text.vocab_size, HEAD_VOCABULARY) * 4
    return MemoryEstimate(
        base_parameters=base_parameters,
        adapter_parameters=adapter_parameters,
        weights=base_parameters * width,
        adapter=adapter_parameters * TRAINED_BYTES,
        activations=activations,
        head=5 * tile,  # both models' logits and what the divergence makes of them
    )
