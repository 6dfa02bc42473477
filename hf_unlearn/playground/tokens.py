"""Tokens with their text and probability, and their HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from transformers import PreTrainedTokenizerBase


# From likely to unlikely: lower bound, background, text colour. The colours differ in lightness, so that they can be
# told apart in every kind of colour vision and in print.
COLOURS = (
    (0.9, "#fffdf0", "#1f1f1f"),
    (0.6, "#fee8a5", "#1f1f1f"),
    (0.3, "#fdb95f", "#1f1f1f"),
    (0.1, "#d8701b", "#000000"),
    (0.0, "#7a2a04", "#ffffff"),
)


@dataclass(frozen=True)
class Token:
    """
    A token as the page shows it. Tokens that are parts of one character are shown as one.

    Args:
        text (`str`): Its text; that of a special token is its name.
        probability (`float`): Probability that the model gives it after all before it, at temperature 1. Of several
            tokens it is the product.
        count (`int`, *optional*, defaults to `1`): How many tokens it stands for.
        is_end (`bool`, *optional*, defaults to `False`): Whether it ends the answer.
    """

    text: str
    probability: float
    count: int = 1
    is_end: bool = False


def spell(
    steps: Iterable[tuple[int, float]], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> Iterator[Token]:
    """
    Give tokens their text, as soon as they make whole characters.

    Args:
        steps (iterable of `tuple[int, float]`): Token id and probability of each token of an answer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        ends (sequence of `int`): Tokens that end an answer.
    """
    before: list[int] = []  # tokens of the last one shown: SentencePiece drops the space that a text begins with
    held: list[int] = []  # tokens not shown yet
    probability = 1.0

    def text() -> str:
        whole = tokenizer.decode(before + held, clean_up_tokenization_spaces=False)
        return whole[len(tokenizer.decode(before, clean_up_tokenization_spaces=False)) :]

    for token, step_probability in steps:
        is_end = token in ends
        if is_end and held:  # the answer ends within a character
            yield Token(text(), probability, len(held))
            before, held, probability = held, [], 1.0
        held.append(token)
        probability *= step_probability
        if is_end or not text().endswith("\N{REPLACEMENT CHARACTER}"):
            yield Token(text(), probability, len(held), is_end)
            before, held, probability = held, [], 1.0
    if held:
        yield Token(text(), probability, len(held))


def mean_probability(tokens: Sequence[Token]) -> float:
    """Geometric mean of the probabilities of tokens, which of an answer is its answer probability; 1 without tokens."""
    log_probability = sum(math.log(token.probability) if token.probability else -math.inf for token in tokens)
    return math.exp(log_probability / max(sum(token.count for token in tokens), 1))


def colour_of(probability: float) -> tuple[str, str]:
    """Background and text colour."""
    return next((background, text) for bound, background, text in COLOURS if probability >= bound)


def tokens_html(tokens: Sequence[Token]) -> str:
    """Tokens on the colours of their probabilities, which are told where the pointer rests."""
    return "".join(map(_token_html, tokens))


def legend_html() -> str:
    """What the colours mean."""
    bounds = [1.0, *(bound for bound, _, _ in COLOURS)]
    return "".join(
        f'<span class="token" style="background:{background};color:{text}">{lower:g} – {upper:g}</span>'
        for upper, (lower, background, text) in zip(bounds, COLOURS, strict=False)
    )


def _token_html(token: Token) -> str:
    background, colour = colour_of(token.probability)
    told = f"probability {format_probability(token.probability)}"
    text = escape(token.text).replace("\n", "↵\n")
    if token.is_end:
        told, text = f"end of the answer, {told}", "■"
    elif token.count > 1:
        told = f"{token.count} tokens, {told}"
    return f'<span class="token" style="background:{background};color:{colour}" title="{told}">{text}</span>'


def format_probability(probability: float) -> str:
    """A probability in three digits; small ones in powers of ten."""
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.1e}"
