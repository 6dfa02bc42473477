"""What an evaluation yields: per-row values, generated answers and the figures computed from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hf_unlearn.evaluation.figures import Figure


@dataclass
class Evaluation:
    """
    One model, or one adapter at one α, under one protocol.

    Args:
        protocol (`str`): Name of the protocol, such as `"tofu"`.
        alpha (`float`, *optional*): Extrapolation strength; 0 is the reference, `None` a model as it is.
        rows (`dict[str, dict[str, list]]`): Per set and column, the value of each row. The column `row` holds the ids
            of the rows; others are floats, e.g. `loss` (nats per answer token) and `probability`, or lists of floats,
            e.g. `wrong_losses` (one entry per wrong answer).
        answers (`dict[str, list[str]]`): Per set, the generated answers, where they were generated.
        figures (`dict[str, Figure]`): Figures over whole sets, named `<set>_<metric>` where they are of one set.
    """

    protocol: str
    alpha: float | None = None
    rows: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """Value of a figure; `None` where the protocol has no such figure or it was not computed."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value

    def summary(self) -> dict[str, float | None]:
        """One flat row: `alpha`, then the value of every figure."""
        return {"alpha": self.alpha} | {name: figure.value for name, figure in self.figures.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Evaluation:
        """The inverse of [`~Evaluation.to_dict`]."""
        figures = {name: Figure(**figure) for name, figure in content["figures"].items()}
        return cls(**content | {"figures": figures})
