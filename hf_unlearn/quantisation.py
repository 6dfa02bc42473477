"""Base models in 4 or 8 bits (bitsandbytes): what is checked before one is loaded, and how its layers compute."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.arithmetic import FLOAT_DTYPES


def check_quantization(
    model: str | PreTrainedModel,
    quantization_config: BitsAndBytesConfig | None,
    model_init_kwargs: dict[str, Any] | None = None,
) -> None:
    """
    Raise where a base model cannot be quantised as asked, before anything is loaded.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): The base as the user passed it.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): How it is to be quantised.
        model_init_kwargs (`dict`, *optional*): Arguments of `from_pretrained`, which may hold another.
    """
    of_loading = (model_init_kwargs or {}).get("quantization_config")
    if quantization_config is not None and of_loading is not None:
        raise UnlearningError(
            "`quantization_config` is given twice: as an argument and in `model_init_kwargs`. Leave out the latter."
        )
    config = quantization_config if quantization_config is not None else of_loading
    if config is None:
        return
    if not isinstance(model, str):
        raise UnlearningError(
            "`quantization_config` has no effect on a model that is loaded already. Pass the model's name or folder, "
            "or load it with `from_pretrained(..., quantization_config=...)` and leave the option out."
        )
    require_bitsandbytes()


def require_bitsandbytes() -> None:
    """Raise unless bitsandbytes is installed."""
    if not is_bitsandbytes_available():
        raise UnlearningError(
            "A base in 4 or 8 bits (`load_in_4bit`, `load_in_8bit`, `quantization_config`) needs bitsandbytes: "
            "`pip install hf-unlearn[quantization]`. Or leave the option out."
        )


def use_training_kernels(model: nn.Module) -> None:
    """
    Let the layers of bitsandbytes compute alike in training and in evaluation mode, which select kernels and nothing
    else in them.

    On CPU the kernels of evaluation differ: 4-bit weights are packed for inference in bf16, for good, and no gradient
    flows through them afterwards; 8-bit layers round their inputs too. The reference would then not be the model that
    is trained, and training after an evaluation would go wrong without a word.

    Args:
        model (`torch.nn.Module`): A model with layers of bitsandbytes.
    """
    if not is_bitsandbytes_available():  # so the model has none, however else it is quantised
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in model.named_modules():
        if not isinstance(module, (Linear4bit, Linear8bitLt)):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnlearningError(
                f"The 4-bit weight of {name!r} has been packed for inference on CPU by an earlier call of the model in "
                "evaluation mode, and no gradient flows through it. Load the model again, or pass its name."
            )
        module.register_forward_pre_hook(_enter_training_mode)


def _enter_training_mode(module: nn.Module, inputs: tuple) -> None:
    module.training = True


def prepare_quantised(model: PeftModel) -> None:
    """
    Make a quantised base with a new adapter ready for training.

    Args:
        model (`peft.PeftModel`): The adapter on its quantised base.
    """
    if model.get_output_embeddings().weight.dtype not in FLOAT_DTYPES:
        raise UnlearningError(
            "The LM head is quantised, and tokens are scored with its weight. Name it in `llm_int8_skip_modules` of "
            "the quantisation, e.g. ['lm_head']."
        )
    use_training_kernels(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL casts to bf16, in which small steps and most -alpha * B are rounded away
            parameter.data = parameter.data.to(torch.float32)
