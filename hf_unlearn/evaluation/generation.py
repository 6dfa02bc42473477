"""One batched generation pass."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data.tokenization import encode_prompt


def generate_answers(
    model: PreTrainedModel | PeftModel,
    prompts: list[str | list[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[str]:
    """
    Answer prompts by greedy decoding, left-padded, until EOS.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM, used as it stands.
        prompts (list of `str` or of messages):
            Prompts as [`~hf_unlearn.data.to_prompt_completion`] gives them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest answer.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts in a batch.
        progress (`str`, *optional*):
            Label of a progress bar; none is shown if not given.

    Returns:
        `list[str]`: the answers without special tokens and outer white space, in the order of the prompts.
    """
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=_eos_token_ids(model, tokenizer),
        pad_token_id=pad_token_id,
    )
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]), reverse=True)
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc=progress, disable=progress is None, leave=False):
            indices = order[start : start + batch_size]
            length = max(len(encoded[index]) for index in indices)
            padding = [length - len(encoded[index]) for index in indices]
            ids = torch.tensor(
                [[pad_token_id] * n + encoded[index] for n, index in zip(padding, indices, strict=True)]
            )
            mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding])
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
                )
            texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text.strip()
    finally:
        model.train(was_training)
    return answers


def _eos_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the tokenizer's EOS and those of the model's generation config."""
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in [tokenizer.eos_token_id, *of_model] if token is not None})
