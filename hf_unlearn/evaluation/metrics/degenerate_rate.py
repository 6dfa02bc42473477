"""Share of answers that are no language: loops, non-words, symbols, nothing."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import evaluate

from hf_unlearn.evaluation.figures import mean_figure
from hf_unlearn.evaluation.metrics.info import TEXT, metric_info, to_result
from hf_unlearn.evaluation.metrics.rouge import UnicodeTokenizer


REPEATED_TRIGRAMS = 0.5  # share of an answer's word trigrams that occurred before in it
SHORTEST_TRIGRAMS = 10  # trigrams from which on that share says something
LONGEST_PHRASE = 20  # words of a phrase that is looked for in loops
NON_WORDS = 0.2  # share of an answer's words, two at least
LONGEST_WORD = 45  # letters
CONSONANTS = 5  # in a row ("ch" is one, "w" and "y" are none), which few words in Latin script have ("Bergstrom")
REPLACEMENTS = 2  # replacement characters (�); one or two are left where generation stopped within a character
READABLE = 0.5  # share of letters and digits in an answer
SHORTEST_SYMBOLS = 10  # characters from which on that share says something

_DIGRAPH = re.compile(r"[cgpst]h|ck|ng")
_UNPRONOUNCEABLE = re.compile(rf"[bcdfghjklmnpqrstvxz]{{{CONSONANTS}}}|q[bcdfghjklmnpqrstvwxz]|([a-z])\1{{3}}")
_WORD = re.compile(r"[^\W\d_]+")
_EAST_ASIAN = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "HANGUL")  # stand beside Latin letters


def is_degenerate(text: str) -> bool:
    """
    Whether an answer is no language.

    It is if it is empty; if more than two of its characters are replacement characters, or less than half are letters
    and digits; if more than half of its word trigrams repeat earlier ones; if a phrase of up to 20 words follows itself
    four times, or three times and makes up half of it; or if at least two words and a fifth of all are no words: five
    consonants or four equal letters in a row, scripts mixed within a word, capitals scattered through it; or if words
    of more than 45 letters make up half of it.

    Args:
        text (`str`): The generated answer, in any script.
    """
    return not text.strip() or _is_unreadable(text) or _is_repetitive(text) or _has_non_words(text)


def _is_unreadable(text: str) -> bool:
    visible = [char for char in text if not char.isspace()]
    readable = sum(unicodedata.category(char)[0] in "LMN" for char in visible)
    too_few = len(visible) >= SHORTEST_SYMBOLS and readable < READABLE * len(visible)
    return too_few or text.count("\N{REPLACEMENT CHARACTER}") > REPLACEMENTS


def _is_repetitive(text: str) -> bool:
    words = UnicodeTokenizer().tokenize(re.sub(r"(?<=\d)[.,](?=\d)", "", text))  # 1,000,000 is one word
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    if len(trigrams) >= SHORTEST_TRIGRAMS and 1 - len(set(trigrams)) / len(trigrams) > REPEATED_TRIGRAMS:
        return True
    return any(_loops(words, length) for length in range(1, min(LONGEST_PHRASE, len(words) // 3) + 1))


def _loops(words: list[str], length: int) -> bool:
    """Whether a phrase of this length follows itself four times, or three times and makes up half of the words."""
    run = longest = 0
    for earlier, later in zip(words, words[length:], strict=False):
        run = run + 1 if earlier == later else 0
        longest = max(longest, run)
    covered = longest + length
    return covered >= 4 * length or (covered >= 3 * length and 2 * covered >= len(words))


def _has_non_words(text: str) -> bool:
    words = _WORD.findall(text)
    if not words:
        return False
    if sum(len(word) for word in words if _is_overlong(word)) > sum(map(len, words)) / 2:
        return True
    non_words = sum(map(_is_non_word, words))
    return non_words >= 2 and non_words >= NON_WORDS * len(words)


def _is_overlong(word: str) -> bool:
    return len(word) > LONGEST_WORD and not unicodedata.name(word[0], "").startswith((*_EAST_ASIAN, "THAI", "LAO"))


def _is_non_word(word: str) -> bool:
    if len(word) < 4 or (word.isupper() and len(word) <= 6):  # the latter an acronym
        return False
    names = [unicodedata.name(char, "") for char in word]
    latin = sum(name.startswith("LATIN") for name in names)
    if latin and latin + sum(name.startswith(_EAST_ASIAN) for name in names) < len(word):
        return True
    plain = "".join(char for char in unicodedata.normalize("NFD", word) if unicodedata.category(char) != "Mn")
    scattered_capitals = len(re.findall(r"[a-z][A-Z]", plain)) > 1
    return scattered_capitals or _UNPRONOUNCEABLE.search(_DIGRAPH.sub("h", plain.lower())) is not None


class DegenerateRate(evaluate.Metric):
    """Share of the predictions that are no language: loops, non-words, symbols, nothing."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, predictions=TEXT)

    def _compute(self, predictions: list[str]) -> dict[str, Any]:
        return to_result("degenerate_rate", mean_figure([is_degenerate(text) for text in predictions]))
