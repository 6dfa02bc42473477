"""Quantisation: coarser weights can bring back what a small change had hidden."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.utils import is_bitsandbytes_available

from hf_unlearn.audit.attack import Attack
from hf_unlearn.audit.case import Case
from hf_unlearn.audit.findings import Measurement
from hf_unlearn.audit.weights import Change, changed_weights, linear_weights


BLOCK = 64  # weights that share a scale in 4 bits


def eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """
    LLM.int8's weights: each row in 127 steps of its largest absolute value, in fp32.

    Args:
        weight (`torch.Tensor` of shape `(outputs, inputs)`): A weight.
    """
    wide = weight.float()
    step = wide.abs().amax(1, keepdim=True) / 127
    return torch.where(step > 0, (wide / step).round() * step, wide)


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    """QLoRA's weights: NF4 in blocks of 64, by bitsandbytes. Shapes as in [`eight_bits`]."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4"))


class Quantisation(Attack):
    """The linear layers but the LM head in 8 and in 4 bits."""

    name = "quantisation"
    title = "Quantisation"
    what = "The weights of all linear layers but the LM head are rounded to 8 bits (a scale a row) and to NF4 (a scale a block of 64)."

    def notes(self, case: Case) -> list[str]:
        if is_bitsandbytes_available():
            return []
        return ["4 bits: not run, NF4 needs bitsandbytes: pip install hf-unlearn[quantization]."]

    def plan(self, case: Case) -> str:
        return "round the linear layers to " + " and to ".join(self._variants())

    def measure(self, case: Case) -> list[Measurement]:
        names = linear_weights(case.model)
        found = list(case.asked.values())
        for variant, rounded in self._variants().items():
            with changed_weights(case.model, _change(names, rounded)):
                found += [case.ask(variant, name) for name in case.rows]
        return found

    def judged(self, measurements: list[Measurement]) -> list[Measurement]:
        return [each for each in super().judged(measurements) if each.variant in self._variants()]

    @staticmethod
    def _variants() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        return {"8 bits": eight_bits} | ({"4 bits": four_bits} if is_bitsandbytes_available() else {})


def _change(names: dict[str, bool], rounded: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """The change of weights whose rows are outputs, or inputs where `names` says so."""

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if name not in names:
            return None
        return rounded(weight.T).T if names[name] else rounded(weight)

    return change
