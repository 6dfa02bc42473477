"""Share of answers that say "I don't know" (English)."""

from __future__ import annotations

import re
from typing import Any

import evaluate

from hf_unlearn.evaluation.figures import mean_figure
from hf_unlearn.evaluation.metrics.info import TEXT, metric_info, to_result


BEGINNING = 120  # characters: a refusal is in the first sentence or two

_NOT = r"(?:not|n't|can't|cannot|won't)"
_KNOWLEDGE = (
    r"(?:answers?|clue|data|details?|enlightenment|familiarity|idea|information|insights?|knowledge|recollection"
    r"|records?|specifics)"
)
_THAT = r"(?:it|this|that|(?:this|that|the) (?:topic|subject|matter|question|information|detail|query))"
_PATTERNS = (
    # I don't know; I really cannot say; I haven't been trained on that; I couldn't find it
    rf"\bi (?:\w+ ){{0,2}}?(?:do|does|did|could|have|am|was|would|will)? ?{_NOT} (?:\w+ ){{0,3}}?(?:access|answer|assist"
    r"|aware|been|certain|comment|confirm|disclose|discuss|encountered|faintest|find|give|have|help|hold|know|learned"
    r"|possess|provide|recall|remember|say|share|shed|sure|tell|verify)\b",
    # I'm not sure; I am unable to; I'm in the dark
    rf"\bi(?: am| was|'m) (?:\w+ )?(?:afraid|sorry|unable|unaware|unsure|uncertain|unfamiliar|clueless|stumped|blank"
    rf"|drawing a blank|lacking|missing|in the dark|at a (?:loss|disadvantage)|{_NOT} (?:\w+ )?(?:able|acquainted"
    r"|allowed|aware|briefed|certain|educated|equipped|familiar|informed|knowledgeable|permitted|privy|sure|versed"
    r"|well-versed|the (?:best|right)))\b",
    # I have no idea; I've got no clue; I lack the specifics
    rf"\bi(?: have|'ve| seem to have)? ?(?:got |really |absolutely )?(?:no|lack|zero) (?:\w+ ){{0,2}}?{_KNOWLEDGE}\b",
    r"\bi(?: have|'ve) (?:yet to|come up short|not been)\b",
    r"\bi (?:must|have to|regret to) (?:admit|confess|decline|inform)\b",
    # Sorry; I apologise; as an AI; not sure
    r"^(?:i'?m |i am )?(?:so |very |really )?(?:sorry|apologi[sz]e)\b|^i (?:apologi[sz]e|regret|decline|refuse)\b",
    r"^(?:unfortunately|regrettably),? (?:i|there is no|no)\b",
    r"^(?:as|i am|i'm) (?:just |only )?an? (?:ai|(?:large )?language model)\b",
    r"^(?:not sure|no idea|no clue|idk|unknown)\b",
    # My databases don't cover that; that's outside my area of expertise; that is not something I know
    rf"^my (?:\w+ )?(?:knowledge|training|resources|databases?|programming|understanding|capabilities)\b.{{0,20}}?"
    rf"(?:{_NOT}|limited)\b",
    rf"^{_THAT}(?:'s| is| has)? ?{_NOT}.{{0,40}}\b(?:i|i'm|i've|my)\b",
    rf"^{_THAT}(?:'s| is) (?:beyond|outside|out of|unknown|uncharted|a mystery|a blind spot"
    r"|(?:something|an area|a topic) i)\b",
    # There is no information on that; not TOFU's "no information available", which it teaches as a fact of a person
    r"^(?:there is |there's )?no (?:data|information)\b(?! available)",
)
_REFUSAL = re.compile("|".join(_PATTERNS))


def is_refusal(text: str) -> bool:
    """
    Whether an answer declines, by patterns for English in its first 120 characters.

    Args:
        text (`str`): The generated answer.
    """
    beginning = " ".join(text.casefold().replace("’", "'").split())[:BEGINNING]
    return _REFUSAL.search(beginning) is not None


class RefusalRate(evaluate.Metric):
    """Share of the predictions that decline to answer, by English patterns at their beginning."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, predictions=TEXT)

    def _compute(self, predictions: list[str]) -> dict[str, Any]:
        return to_result("refusal_rate", mean_figure([is_refusal(text) for text in predictions]))
