"""ROUGE of generated answers."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any, NamedTuple

import evaluate
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from hf_unlearn.evaluation.figures import mean_figure
from hf_unlearn.evaluation.metrics.info import TEXT, metric_info, to_result


# Beginnings of the Unicode names of letters whose scripts put no space between words.
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


class RougeScores(NamedTuple):
    """ROUGE of one answer, each value in [0, 1]."""

    rouge_1_recall: float
    rouge_l_recall: float
    rouge_l_f1: float


def rouge(reference: str, prediction: str) -> RougeScores:
    """
    ROUGE-1 recall, ROUGE-L recall and ROUGE-L F1 of `rouge_score`, stemmed.

    Its own tokenizer knows the letters a–z only: a text in any other script has no tokens under it and scores 0, which
    would read as perfect forgetting. Where most letters of the reference are not Latin, both texts are cut into words
    of any script instead, and into single characters where the script puts no space between words.

    Args:
        reference (`str`): The answer of the row.
        prediction (`str`): The generated answer.
    """
    scores = _scorer(_is_mostly_latin(reference)).score(reference, prediction)
    return RougeScores(
        float(scores["rouge1"].recall), float(scores["rougeL"].recall), float(scores["rougeL"].fmeasure)
    )


def rouge_l_recall(reference: str, prediction: str) -> float:
    """ROUGE-L recall: share of the reference's words in the longest common subsequence (TOFU). See [`rouge`]."""
    return rouge(reference, prediction).rouge_l_recall


def _is_mostly_latin(text: str) -> bool:
    letters = [char for char in text if char.isalpha()]
    latin = sum(unicodedata.name(char, "").startswith("LATIN") for char in letters)
    return 2 * latin >= len(letters)


@cache
def _scorer(latin: bool) -> RougeScorer:
    tokenizer = DefaultTokenizer(use_stemmer=True) if latin else UnicodeTokenizer()
    return RougeScorer(["rouge1", "rougeL"], tokenizer=tokenizer)


class UnicodeTokenizer(Tokenizer):
    """Words of any script, casefolded; one token per character where the script puts no space between words."""

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        previous = " "  # what came before: a "word" that goes on, a single "char", or a " " between tokens
        for char in unicodedata.normalize("NFKC", text).casefold():
            category = unicodedata.category(char)[0]
            if category == "M" and previous != " ":
                tokens[-1] += char
            elif category not in "LN":
                previous = " "
            elif unicodedata.name(char, "").startswith(UNSPACED):
                tokens.append(char)
                previous = "char"
            elif previous == "word":
                tokens[-1] += char
            else:
                tokens.append(char)
                previous = "word"
        return tokens


class Rouge(evaluate.Metric):
    """Mean ROUGE-L recall, with ROUGE-1 recall and ROUGE-L F1; `low` and `high` are of ROUGE-L recall."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, predictions=TEXT, references=TEXT)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        rows = [rouge(*pair) for pair in zip(references, predictions, strict=True)]
        result = to_result("rouge_l_recall", mean_figure([row.rouge_l_recall for row in rows]))
        for name in ("rouge_1_recall", "rouge_l_f1"):
            figure = mean_figure([getattr(row, name) for row in rows])
            result |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        return result
