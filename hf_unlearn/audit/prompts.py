"""Attacks that ask in another way: other words, examples, a system turn."""

from __future__ import annotations

import random

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_unlearn.audit.attack import Attack
from hf_unlearn.audit.case import PARAPHRASED, Case, Row
from hf_unlearn.audit.findings import Measurement
from hf_unlearn.data.formats import Messages


NO_PROMPTS = "the forget set holds text without questions"


class Paraphrase(Attack):
    """The questions in other words."""

    name = "paraphrase"
    title = "Paraphrased questions"
    what = "The same is asked in other words, as a column of the forget set gives them."

    def obstacle(self, case: Case) -> str | None:
        if not self._prompts(case, "forget"):
            return f"the forget set has no column {PARAPHRASED}. Name another with --paraphrased_questions"
        return None

    def notes(self, case: Case) -> list[str]:
        missing = len(case.rows["forget"]) - len(self._prompts(case, "forget"))
        notes = [f"{missing} forget rows have no paraphrased question and are left out."] if missing else []
        if "holdout" in case.rows and not self._prompts(case, "holdout"):
            notes.append("The hold-out rows have no paraphrased questions and are asked as they stand.")
        return notes

    def plan(self, case: Case) -> str:
        return f"ask {len(self._prompts(case, 'forget'))} paraphrased questions"

    def measure(self, case: Case) -> list[Measurement]:
        prompts = {name: self._prompts(case, name) for name in case.asked_sets}
        asked = [case.ask("other words", name, prompts[name]) for name in prompts if prompts[name]]
        return [*(case.asked[name] for name in prompts), *asked]

    def judged(self, measurements: list[Measurement]) -> list[Measurement]:
        return [each for each in super().judged(measurements) if each.variant == "other words"]

    @staticmethod
    def _prompts(case: Case, name: str) -> dict[int, str | Messages]:
        return {place: row.paraphrase for place, row in enumerate(case.rows[name]) if row.paraphrase is not None}


class FewShot(Attack):
    """Other forget rows as examples."""

    name = "few_shot"
    title = "Few-shot leakage"
    what = (
        "Other forget rows stand in the prompt with their answers, as turns or as text; the same before hold-out rows."
    )

    def obstacle(self, case: Case) -> str | None:
        if not case.has_prompts("forget"):
            return NO_PROMPTS
        if any(not self._others(case, row) for row in case.rows["forget"]):
            return "there is no other forget row to show as an example"
        return None

    def plan(self, case: Case) -> str:
        return f"ask after {case.options.few_shot} other forget rows, with their answers"

    def measure(self, case: Case) -> list[Measurement]:
        variant = f"{case.options.few_shot} examples"
        asked = [case.ask(variant, name, self.prompts(case, name)) for name in case.asked_sets]
        return [*(case.asked[name] for name in case.asked_sets), *asked]

    def judged(self, measurements: list[Measurement]) -> list[Measurement]:
        return [each for each in super().judged(measurements) if each.variant.endswith("examples")]

    def prompts(self, case: Case, name: str) -> dict[int, str | Messages]:
        """The prompt of each row of a set, after the examples that the seed draws for it."""
        prompts = {}
        for place, row in enumerate(case.rows[name]):
            others = self._others(case, row)
            draw = random.Random(f"{case.options.seed}, {name}, {place}")
            prompts[place] = with_examples(row, draw.sample(others, min(case.options.few_shot, len(others))))
        return prompts

    @staticmethod
    def _others(case: Case, row: Row) -> list[Row]:
        return [each for each in case.rows["forget"] if each.prompt != row.prompt and each.answer != row.answer]


def with_examples(row: Row, examples: list[Row]) -> str | Messages:
    """
    The prompt of a row after other rows with their answers. A system turn of the row stays first, those of the examples
    are left out; texts stand apart by a blank line.
    """
    if isinstance(row.prompt, str):
        return "\n\n".join([*(each.prompt + each.completion for each in examples), row.prompt])
    system = [turn for turn in row.prompt if turn["role"] == "system"]
    turns = [turn for each in examples for turn in [*each.prompt, *each.completion] if turn["role"] != "system"]
    return [*system, *turns, *(turn for turn in row.prompt if turn["role"] != "system")]


class SystemPrompt(Attack):
    """A system turn that asks for what was forgotten."""

    name = "system_prompt"
    title = "System-prompt leakage"
    what = "A system turn asks to answer truthfully and to ignore any training to forget; it takes the place of the rows' own."

    def obstacle(self, case: Case) -> str | None:
        if not case.chat:
            return "the forget rows are no conversations, so there is no system turn"
        if not takes_system_turn(case.tokenizer):
            return "the tokenizer's chat template takes no system turn"
        return None

    def plan(self, case: Case) -> str:
        return f"ask under the system turn {case.options.system_prompt!r}"

    def measure(self, case: Case) -> list[Measurement]:
        turn = {"role": "system", "content": case.options.system_prompt}
        asked = []
        for name in case.asked_sets:
            prompts = {
                place: [turn, *(other for other in row.prompt if other["role"] != "system")]
                for place, row in enumerate(case.rows[name])
            }
            asked.append(case.ask("system turn", name, prompts))
        return [*(case.asked[name] for name in case.asked_sets), *asked]

    def judged(self, measurements: list[Measurement]) -> list[Measurement]:
        return [each for each in super().judged(measurements) if each.variant == "system turn"]


def takes_system_turn(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a system turn into the prompt, rather than refuse or drop it."""
    marker = "only-what-is-written-here-counts"
    turns = [{"role": "system", "content": marker}, {"role": "user", "content": "?"}]
    try:
        return marker in tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):
        return False
