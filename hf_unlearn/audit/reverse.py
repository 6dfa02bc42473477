"""Reverse extrapolation: who has the base walks on, away from the model and beyond the base."""

from __future__ import annotations

from hf_unlearn.audit.attack import Attack, Pair, Retrained
from hf_unlearn.audit.case import Case
from hf_unlearn.audit.findings import Comparison, Measurement
from hf_unlearn.audit.weights import changed_weights


MAX_STEP = 4.0  # ways beyond the base; with a small α the memorising model lies further off than weights can be undone


class Reverse(Attack):
    """θ_base + t·(θ_base − θ_model)."""

    name = "reverse"
    title = "Reverse extrapolation"
    what = "The change from the base to the model is undone and walked beyond: θ_base + t·(θ_base − θ_model)."
    axis = "Way beyond the base, t"

    def obstacle(self, case: Case) -> str | None:
        if case.base is None:
            return "it needs the model before forgetting. Name it with --base"
        return None

    def plan(self, case: Case) -> str:
        return f"walk from {case.base.label} to t = {', '.join(f'{t:g}' for t in self._steps(case))}"

    def notes(self, case: Case) -> list[str]:
        if case.alpha is None:
            return []
        note = f"The model was extrapolated at α = {case.alpha:g}, so t = 1/α = {1 / case.alpha:.4g} is the memorising model itself"
        return [note + ("." if 1 / case.alpha <= MAX_STEP else f"; beyond t = {MAX_STEP:g} it is not tried.")]

    def measure(self, case: Case) -> list[Measurement]:
        with changed_weights(case.model, case.base.at(0.0)):
            found = [*case.of_base.values()]
        for t in self._steps(case):
            with changed_weights(case.model, case.base.at(t)):
                found += [case.ask(f"t = {t:.4g}", name, generate=False, x=t) for name in case.rows]
        return found

    def judged(self, measurements: list[Measurement]) -> list[Measurement]:
        return [each for each in super().judged(measurements) if each.x]

    def reference(
        self, case: Case, measurements: list[Measurement], attacked: Measurement, measure: str, retrained: Retrained
    ) -> Pair:
        base = case.of_base["forget"]
        return Pair(attacked.values[measure], base.at(measure, attacked.positions), "the base", True)

    def rule(self, case: Case, comparisons: list[Comparison]) -> str:
        return (
            "Leaks where, at any t, the forget rows are more likely than under the base by at least "
            f"{case.options.margin:.0%} of what the base leaves to 1, and the 95 % interval of the difference lies above "
            "0; where it does not, unclear."
        )

    @staticmethod
    def _steps(case: Case) -> list[float]:
        exact = [1 / case.alpha] if case.alpha is not None and 1 / case.alpha <= MAX_STEP else []
        return sorted({*case.options.reverse_steps, *exact})
