"""The text of tokens, and their colours."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hf_unlearn.playground.tokens import (
    COLOURS,
    Token,
    colour_of,
    format_probability,
    legend_html,
    mean_probability,
    spell,
    tokens_html,
)


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as the byte-level tokenizers of real models write rare characters."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<unk>", "</s>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return wrapped(backend)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words that begin with a space, which decoding drops where a text begins."""
    words = {"<unk>": 0, "</s>": 1, "▁who": 2, "▁is": 3, "▁Ada": 4, "?": 5}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return wrapped(backend)


class TestSpell:
    def test_bytes_of_a_character_are_one(self):
        tokenizer = byte_tokenizer()
        ids = tokenizer("aé€b")["input_ids"]
        assert len(ids) == 1 + 2 + 3 + 1
        probabilities = [0.9, 0.5, 0.5, 0.5, 0.25, 0.5, 0.8]
        tokens = list(spell(zip(ids, probabilities, strict=True), tokenizer, [1]))
        assert tokens == [Token("a", 0.9), Token("é", 0.25, 2), Token("€", 0.0625, 3), Token("b", 0.8)]

    def test_half_a_character_at_the_end_is_shown(self):
        tokenizer = byte_tokenizer()
        ids = tokenizer("a€")["input_ids"][:3]
        (_, half) = spell(zip(ids, [0.5] * 3, strict=True), tokenizer, [1])
        assert (half.text.strip("�"), half.probability, half.count) == ("", 0.25, 2)
        _, half, end = spell(zip([*ids, 1], [0.5] * 4, strict=True), tokenizer, [1])
        assert (half.text.strip("�"), half.probability, half.count, half.is_end) == ("", 0.25, 2, False)
        assert (end.probability, end.count, end.is_end) == (0.5, 1, True)

    def test_each_is_given_as_soon_as_it_is_whole(self):
        tokenizer = byte_tokenizer()
        read = []

        def steps():
            for token in tokenizer("é!x")["input_ids"]:
                read.append(token)
                yield token, 0.5

        tokens = spell(steps(), tokenizer, [1])
        assert (next(tokens).text, len(read)) == ("é", 2)
        assert (next(tokens).text, len(read)) == ("!", 3)

    def test_spaces_of_sentencepiece(self):
        tokenizer = sentencepiece_tokenizer()
        tokens = list(spell([(token, 0.5) for token in (2, 3, 4, 5)], tokenizer, [1]))
        assert [token.text for token in tokens] == ["who", " is", " Ada", "?"]

    def test_special_tokens(self):
        tokens = list(spell([(1, 0.5), (5, 0.25), (2, 0.125)], tiny_tokenizer(), [2]))
        assert [(token.text.strip(), token.is_end) for token in tokens] == [
            ("<s>", False),
            ("w5", False),
            ("</s>", True),
        ]


class TestProbabilities:
    def test_mean(self):
        assert mean_probability([Token("a", 0.5), Token("b", 0.125)]) == pytest.approx(0.25)
        assert mean_probability([Token("a", 0.5), Token("é", 1 / 64, 3)]) == pytest.approx(2 ** (-7 / 4))
        assert mean_probability([Token("a", 0.0), Token("b", 0.5)]) == 0

    @pytest.mark.parametrize(
        ("value", "text"), [(1.0, "1.000"), (0.12345, "0.123"), (0.001, "0.001"), (0.00042, "4.2e-04"), (0, "0.0e+00")]
    )
    def test_format(self, value, text):
        assert format_probability(value) == text


def luminance(colour: str) -> float:
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


class TestColours:
    @pytest.mark.parametrize(
        ("probability", "index"), [(1, 0), (0.9, 0), (0.89, 1), (0.3, 2), (0.1, 3), (0.0999, 4), (0, 4)]
    )
    def test_bounds(self, probability, index):
        assert colour_of(probability) == COLOURS[index][1:]

    def test_they_differ_in_lightness_and_can_be_read(self):
        backgrounds = [background for _, background, _ in COLOURS]
        for lighter, darker in pairwise(backgrounds):
            assert luminance(lighter) > luminance(darker)
            assert contrast(lighter, darker) > 1.15
        for _, background, text in COLOURS:
            assert contrast(background, text) >= 4.5  # WCAG 2, level AA

    def test_legend(self):
        text = re.sub(r"<[^>]+>", " ", legend_html()).split("  ")
        assert [part.strip() for part in text if part.strip()] == [
            "0.9 – 1",
            "0.6 – 0.9",
            "0.3 – 0.6",
            "0.1 – 0.3",
            "0 – 0.1",
        ]
        for _, background, _ in COLOURS:
            assert background in legend_html()


class TestHtml:
    def test_text_is_escaped_and_line_breaks_are_seen(self):
        html = tokens_html(
            [Token("<b onclick='x'>&", 0.95), Token("\n", 0.2), Token("é", 0.01, 2), Token("</s>", 0.5, 1, True)]
        )
        assert "<b" not in html
        assert "&lt;b onclick=&#x27;x&#x27;&gt;&amp;" in html
        assert ">↵\n</span>" in html
        assert 'title="2 tokens, probability 0.010"' in html
        assert 'title="end of the answer, probability 0.500">■</span>' in html
        assert html.count("<span") == 4
