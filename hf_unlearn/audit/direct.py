"""The model as it is, asked as the rows ask: what every attack is seen beside."""

from __future__ import annotations

from hf_unlearn.audit.attack import Attack
from hf_unlearn.audit.case import Case
from hf_unlearn.audit.findings import Measurement
from hf_unlearn.audit.weights import changed_weights


class Direct(Attack):
    """No attack: the rows as they are, and what the base says of them where it is given."""

    name = "direct"
    title = "As it is"
    what = "The rows are asked as they stand, without any attack."

    def plan(self, case: Case) -> str:
        return "ask the rows as they stand" + (", and the base" if case.base is not None else "")

    def measure(self, case: Case) -> list[Measurement]:
        found = list(case.asked.values())
        if case.base is not None:
            with changed_weights(case.model, case.base.at(0.0)):
                found += case.of_base.values()
        return found

    def judged(self, measurements: list[Measurement]) -> list[Measurement]:
        return [each for each in super().judged(measurements) if each.variant != "base"]

    def own_reference(self, case: Case, attacked: Measurement, measure: str) -> None:
        """There is none: only other rows, or another model, say whether this is much."""
