"""Fixtures over the tokenizers of `word_tokenizer.py`."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast
from word_tokenizer import CHAT_TEMPLATE, word_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(chat=CHAT_TEMPLATE)
