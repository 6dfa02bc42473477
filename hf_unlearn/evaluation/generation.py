"""One batched generation pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_unlearn.data.formats import Messages
from hf_unlearn.data.tokenization import encode_prompt
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import BatchSize, run_in_batches
from hf_unlearn.evaluation.forward import Backbone, end_token_ids, keeps_state, pad, prefill


MAX_TOKENS = 16384  # prompt and answer tokens of an automatic batch: their keys and values are what fills the memory

Choose = Callable[[torch.Tensor, list[int], int], torch.Tensor]  # logits (N, V), their N prompts, step -> tokens (N,)


def greedy(logits: torch.Tensor, prompts: list[int], step: int) -> torch.Tensor:
    """The likeliest token of each row."""
    return logits.argmax(-1)


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[str | Messages],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 200,
    batch_size: BatchSize = "auto",
    chat_template_kwargs: dict[str, Any] | None = None,
    progress: str | None = None,
    on_results: Callable[[list[int], list[str]], None] | None = None,
) -> list[str]:
    """
    Answer prompts by greedy decoding, left-padded, until EOS; rows that have ended leave the batch.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM, used as it stands.
        prompts (sequence of `str` or of messages):
            Prompts as [`~hf_unlearn.data.to_prompt_completion`] gives them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest answer.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Prompts in a batch, or batches of up to 16384 tokens.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the chat template.
        progress (`str`, *optional*):
            Label of a progress bar; none is shown if not given.
        on_results (`Callable`, *optional*):
            Gets the indices and answers of each batch of this process as soon as it is done.

    Returns:
        `list[str]`: the answers without special tokens and outer white space, in the order of the prompts.
    """
    backbone = Backbone(model)
    ends = end_token_ids(backbone.lm, tokenizer)
    encoded = [encode_prompt(prompt, tokenizer, chat_template_kwargs) for prompt in prompts]
    if keeps_state(backbone.lm) and backbone.lockstep is not None:
        raise UnlearningError(
            f"{type(backbone.lm).__name__} carries a state, and cannot generate answers while its weights are sharded "
            "(ZeRO-3, FSDP2). Evaluate without generated answers (`generate=False`), or on unsharded weights."
        )
    was_training = model.training
    model.eval()

    def run(indices: list[int]) -> list[str]:
        answers = decode(backbone, [encoded[index] for index in indices], max_new_tokens, ends)
        return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]

    try:
        return run_in_batches(
            [len(ids) + max_new_tokens for ids in encoded],
            run,
            batch_size=batch_size,
            max_tokens=MAX_TOKENS,
            lockstep=backbone.lockstep,
            progress=progress,
            on_results=on_results,
        )
    finally:
        model.train(was_training)


def decode(
    backbone: Backbone, prompts: list[list[int]], max_new_tokens: int, ends: list[int], choose: Choose = greedy
) -> list[list[int]]:
    """
    Continue prompts token by token.

    Args:
        backbone ([`~hf_unlearn.evaluation.forward.Backbone`]): Of a causal LM in evaluation mode.
        prompts (list of `list[int]`): Token ids, at least one each.
        max_new_tokens (`int`): Most tokens of a continuation.
        ends (`list[int]`): Tokens that end one.
        choose (`Callable`, *optional*): Chooses the next tokens; the likeliest if not given.

    Returns:
        list of `list[int]`: the continuations, with the token that ended them.
    """
    if keeps_state(backbone.lm):
        return _decode_with_state(backbone, prompts, max_new_tokens, ends, choose)
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    head, cache = backbone.head, DynamicCache(config=backbone.lm.config)
    hidden, mask = prefill(backbone, prompts, cache)
    for step in range(max_new_tokens):
        tokens = choose(head.logits(hidden[:, -1]), live, step)
        for row, token in zip(live, tokens.tolist(), strict=True):
            answers[row].append(token)
        going = [index for index, row in enumerate(live) if answers[row][-1] not in ends]
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(live):
            live = [live[index] for index in going]
            kept = torch.tensor(going, device=tokens.device)
            tokens, mask = tokens[kept], mask[kept]
            cache.batch_select_indices(kept)
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        hidden = backbone.hidden_states(tokens[:, None], mask, cache)
    return answers


class _Chosen(LogitsProcessor):
    """Leaves one token a row possible: the chosen one."""

    def __init__(self, choose: Choose, start: int) -> None:
        self.choose = choose
        self.start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = self.choose(scores, list(range(len(scores))), input_ids.shape[1] - self.start)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _decode_with_state(
    backbone: Backbone, prompts: list[list[int]], max_new_tokens: int, ends: list[int], choose: Choose
) -> list[list[int]]:
    """For models whose state cannot drop rows: the library's own loop, which keeps them to the end."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    lm = backbone.lm
    ids, mask = pad(prompts, "left", backbone.device)
    chosen = LogitsProcessorList([_Chosen(choose, ids.shape[1])])
    of_model, lm.generation_config = lm.generation_config, config  # else its penalties would join in
    try:
        output = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=chosen)
    finally:
        lm.generation_config = of_model
    answers = output[:, ids.shape[1] :].tolist()
    lengths = [next((n for n, token in enumerate(answer, start=1) if token in ends), None) for answer in answers]
    return [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
