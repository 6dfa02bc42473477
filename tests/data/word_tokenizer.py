"""Tokenizers small enough to derive ids by hand."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<nl>", "<think>", "</think>"]
WORDS += ["who", "is", "Ada", "?", "a", "poet", "be", "brief", "and", "Bo", "painter", "Question:", "Answer:"]
IDS = {word: index for index, word in enumerate(WORDS)}

# Writes a line break after the EOS of every turn, as ChatML does.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s><nl>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def ids(text: str) -> list[int]:
    """Ids of words and special tokens that are parted by spaces."""
    return [IDS[word] for word in text.split()]


def word_tokenizer(
    *,
    adds: str = "<s> $A",
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str = "<pad>",
    chat: str | None = None,
) -> PreTrainedTokenizerFast:
    """One token a word; `adds` is the tokenizer's own template of special tokens."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    special = [(word, IDS[word]) for word in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=WORDS[4:10],
    )
    tokenizer.chat_template = chat
    return tokenizer
