"""The methods of the study: how each is trained, and over what its strength is swept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hf_unlearn.trainer.baselines import METHODS as TRAINERS


@dataclass(frozen=True)
class Method:
    """
    A method.

    Args:
        name (`str`): Its name in tables and files.
        kind (`str`): `"extrapolation"` (an adapter, swept over α), `"baseline"` (swept over the number of steps) or
            `"operator"` (made of trained adapters, swept over α) or `"rounds"` (an adapter that is the sum of
            rounds, each trained where the one before has led to, swept over α).
        trainer (`str`): Name of the method as `hf-unlearn train --method` knows it.
        options (`dict`): Options of its configuration that differ from the setting's.
        full_batch (`bool`): Whether a step sees the whole forget set, in a quarter of the steps.
        columns (`tuple[str, ...]`): Columns of the forget rows that are used too: `paraphrases`, `wrong_answers`.
        learning_rate (`float`): Multiple of the setting's.
        operator (`str`, *optional*): Operator of an `"operator"`.
        of (`str`): Method whose adapters the operator takes.
        compare (`str`): Name of the method it is paired with.
    """

    name: str
    kind: str
    trainer: str = "extrapolation"
    options: dict[str, Any] = field(default_factory=dict)
    full_batch: bool = False
    columns: tuple[str, ...] = ()
    learning_rate: float = 1.0
    operator: str | None = None
    of: str = "mox"
    compare: str = ""


PAPER = {"retain_kl_weight": 1.0, "retain_kl_scale": 1.0, "memorization_temperature": 1.0}
MIRROR = PAPER | {"retain_kl_scale": -1.0}
SOFT = PAPER | {"memorization_temperature": 4.0}
MIRROR_SOFT = MIRROR | SOFT | {"retain_kl_scale": -1.0}


def _extrapolation(name: str, options: dict[str, Any], **rest: Any) -> Method:
    return Method(name, "extrapolation", options=options, **rest)


def _baseline(name: str) -> Method:
    options = {"alternate_column": "perturbed_answer"} if name == "altpo" else {}
    return Method(name, "baseline", trainer=name, options=options, learning_rate=0.3)


def _fast(name: str) -> Method:
    return replace(_baseline(name), name=f"{name}-fast", learning_rate=1.0, compare=name)


def _operator(name: str, operator: str, of: str = "mox") -> Method:
    return Method(name, "operator", operator=operator, of=of, compare=of)


def _rounds(name: str, compare: str, **options: Any) -> Method:
    columns = options.pop("columns", ())
    return Method(name, "rounds", options=MIRROR_SOFT | options, full_batch=True, columns=columns, compare=compare)


METHODS = {
    method.name: method
    for method in (
        _rounds("rounds", "mirror-soft-full"),
        _rounds("rounds-lambda10", "rounds", retain_kl_weight=10.0),
        _rounds("rounds-held", "rounds", retain_kl_scale=-0.5),  # where the step of a round ends
        _rounds("rounds-held-lambda10", "rounds-lambda10", retain_kl_scale=-0.5, retain_kl_weight=10.0),
        _rounds(
            "rounds-held-nll",  # the retain rows are trained on as well, as the baselines do
            "rounds-held-lambda10",
            retain_kl_scale=-0.5,
            retain_kl_weight=10.0,
            retain_nll_weight=10.0,
        ),
        _rounds(
            "rounds-held-wrong",
            "rounds-held-lambda10",
            retain_kl_scale=-0.5,
            retain_kl_weight=10.0,
            columns=("wrong_answers",),
        ),
        Method("rounds-mox", "rounds", options=PAPER, compare="mox"),
        _extrapolation("task-vector", PAPER | {"retain_kl_weight": 0.0}),
        _extrapolation("mox", PAPER, compare="task-vector"),
        _extrapolation("mox-lambda10", PAPER | {"retain_kl_weight": 10.0}, compare="mox"),
        _extrapolation("mox-npo", PAPER | {"memorization_loss": "npo"}, compare="mox"),
        _extrapolation(
            "targeted", PAPER | {"alternate_column": "perturbed_answer"}, trainer="targeted", compare="mox"
        ),
        _extrapolation("full-batch", PAPER, full_batch=True, compare="mox"),
        _extrapolation("soft", SOFT, compare="mox"),
        _extrapolation("mirror", MIRROR, compare="mox"),
        _extrapolation("mirror-soft-full", MIRROR_SOFT, full_batch=True, compare="mox"),
        _extrapolation(
            "mirror-soft-lambda10",
            MIRROR_SOFT | {"retain_kl_weight": 10.0},
            full_batch=True,
            compare="mirror-soft-full",
        ),
        _extrapolation("paraphrases", PAPER, columns=("paraphrases",), compare="mox"),
        _extrapolation("wrong-answers", PAPER, columns=("wrong_answers",), compare="mox"),
        _operator("momentum", "momentum"),
        _operator("seed-average", "average"),
        _operator("consensus", "consensus"),
        _operator("projection", "projection"),
        _operator("fisher", "fisher"),
        _operator("retain-vector", "retain_vector"),
        _operator("rounds-average", "average", of="rounds-held-nll"),
        _operator("rounds-consensus", "consensus", of="rounds-held-nll"),
        _operator("rounds-projection", "projection", of="rounds-held-nll"),
        _operator("rounds-fisher", "fisher", of="rounds-held-nll"),
        _operator("msa", "msa", of="task-vector"),
        *(_baseline(name) for name in TRAINERS if name not in ("extrapolation", "task-vector", "targeted")),
        Method(
            "rmu-strong",  # half way up, five times as far as the activations are long
            "baseline",
            trainer="rmu",
            options={"rmu_layer": 3, "rmu_steering": 30.0},
            compare="rmu",
        ),
        *(_fast(name) for name in ("npo", "simnpo", "dpo", "satimp")),  # good ones, and one that has not begun
    )
}
