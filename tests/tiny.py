"""A tiny random model, its tokenizer and rows of random words, for tests of mechanics."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


VOCABULARY = 64


def tiny_tokenizer():
    """One token a word: `w4` … `w63` after the special tokens."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    """A random Llama of two layers and 64 dimensions; `options` override its configuration."""
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # so that distributions are far from uniform
    }
    return LlamaForCausalLM(LlamaConfig(**defaults | options))


def tiny_rows(count: int, seed: int, longest: int = 7) -> list[dict[str, str]]:
    """Prompt/completion rows of random words and uneven lengths."""
    generator = random.Random(seed)

    def words(shortest: int) -> str:
        return " ".join(f"w{generator.randrange(4, VOCABULARY)}" for _ in range(generator.randint(shortest, longest)))

    return [{"prompt": words(2), "completion": " " + words(1)} for _ in range(count)]
