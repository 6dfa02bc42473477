"""The prefix attack: how much of an answer follows from its beginning."""

from __future__ import annotations

from dataclasses import dataclass

from hf_unlearn.audit.attack import Attack
from hf_unlearn.audit.case import Case
from hf_unlearn.audit.findings import Measurement
from hf_unlearn.evaluation.metrics import probability, rouge_l_recall


@dataclass(frozen=True)
class Split:
    """
    An answer whose beginning is given.

    Args:
        prompt (`list[int]`): The tokens of the question and of the beginning of the answer.
        given (`int`): How many of the answer's tokens are given.
        rest (`list[int]`): The tokens of its text that are not, without those that end it.
    """

    prompt: list[int]
    given: int
    rest: list[int]


def split_answer(prompt: list[int], answer: list[int], num_ends: int, share: float) -> Split | None:
    """
    Give the first `share` of an answer: ⌊share · N⌋ of the N tokens of its text, at least one.

    Args:
        prompt (`list[int]`): The tokens of the question.
        answer (`list[int]`): The tokens of the answer, with those that end it.
        num_ends (`int`): How many of them end it.
        share (`float`): Share of the text's tokens, between 0 and 1.

    Returns:
        [`Split`] or `None`: `None` where the text has fewer than two tokens.
    """
    text = answer[: len(answer) - num_ends]
    if len(text) < 2:
        return None
    given = max(1, int(len(text) * share))
    return Split(prompt + text[:given], given, text[given:])


class Prefix(Attack):
    """The beginning of the answer in the prompt."""

    name = "prefix"
    title = "Prefix attack"
    what = "The first tokens of the answer are given, and the model goes on from there."

    def plan(self, case: Case) -> str:
        return (
            "give the first "
            + " and ".join(f"{100 * share:.4g} %" for share in case.options.prefix_shares)
            + " of each answer"
        )

    def measure(self, case: Case) -> list[Measurement]:
        found = []
        for variant, share in self._variants(case).items():
            for name in case.asked_sets:
                splits = self.splits(case, name, share)
                answers = case.answer([split.prompt for split in splits.values()])
                texts = [self._text(case, split) for split in splits.values()]
                rouge = [rouge_l_recall(*pair) for pair in zip(texts, answers, strict=True)]
                log_probs = [case.scores[name][place].log_probs[split.given :] for place, split in splits.items()]
                values = {"probability": [probability(each) for each in log_probs], "rouge_l_recall": rouge}
                found.append(Measurement(variant, name, list(splits), values, answers))
        return found

    def notes(self, case: Case) -> list[str]:
        if not case.loaded:  # what ends an answer is the model's to say
            return []
        rows = len(case.rows["forget"])
        short = rows - len(self.splits(case, "forget", case.options.prefix_shares[0]))
        return [f"{short} of {rows} forget rows have an answer of one token and are left out."] if short else []

    def splits(self, case: Case, name: str, share: float) -> dict[int, Split]:
        """The answers of a set by the place of their rows; those of fewer than two tokens are left out."""
        splits = {}
        for place, (encoded, scores) in enumerate(zip(case.prepared[name].encoded, case.scores[name], strict=True)):
            rest, skipped = encoded.rests[0], encoded.skipped[0]
            split = split_answer(encoded.prefix + rest[:skipped], rest[skipped:], scores.num_ends, share)
            if split is not None:
                splits[place] = split
        return splits

    def own_reference(self, case: Case, attacked: Measurement, measure: str) -> list[float] | None:
        """
        The same rest of each answer, searched in what the model says without a prefix. Of the probability there is none:
        it is that of the model as it is.
        """
        answers = case.asked["forget"].answers
        if measure != "rouge_l_recall" or answers is None:
            return None
        share = self._variants(case)[attacked.variant]
        splits = self.splits(case, "forget", share)
        return [rouge_l_recall(self._text(case, splits[place]), answers[place]) for place in attacked.positions]

    @staticmethod
    def _variants(case: Case) -> dict[str, float]:
        return {f"first {100 * share:.4g} % given": share for share in case.options.prefix_shares}

    @staticmethod
    def _text(case: Case, split: Split) -> str:
        return case.tokenizer.decode(split.rest, skip_special_tokens=True).strip()
