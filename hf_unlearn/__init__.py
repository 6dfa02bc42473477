"""Make language models forget: memorise with LoRA, then extrapolate away from the memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hf_unlearn import logging as logging  # not in __all__, where it would hide that of Python


__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_unlearn.data import check_sets, load_rows, to_prompt_completion, tokenize_rows
    from hf_unlearn.data.sampling import sample_retain_set
    from hf_unlearn.errors import UnlearningError
    from hf_unlearn.evaluation import (
        Choice,
        Evaluation,
        Evaluator,
        choose_alpha,
        custom_protocol,
        generate_answers,
        read_log,
        tofu_protocol,
    )
    from hf_unlearn.extrapolation import LoraAdapter, extrapolate, save_forget_adapter
    from hf_unlearn.requests import Ledger
    from hf_unlearn.trainer import (
        EvaluationCallback,
        ExtrapolationConfig,
        ExtrapolationTrainer,
        UnlearningConfig,
        UnlearningTrainer,
    )
    from hf_unlearn.trainer.rounds import train_in_rounds

# Public name → module that defines it, imported on first use: torch and TRL take seconds.
_MODULE_OF = {
    "Choice": "evaluation",
    "Evaluation": "evaluation",
    "EvaluationCallback": "trainer",
    "Evaluator": "evaluation",
    "ExtrapolationConfig": "trainer",
    "ExtrapolationTrainer": "trainer",
    "Ledger": "requests",
    "LoraAdapter": "extrapolation",
    "UnlearningConfig": "trainer",
    "UnlearningError": "errors",
    "UnlearningTrainer": "trainer",
    "check_sets": "data",
    "choose_alpha": "evaluation",
    "custom_protocol": "evaluation",
    "extrapolate": "extrapolation",
    "generate_answers": "evaluation",
    "load_rows": "data",
    "read_log": "evaluation",
    "sample_retain_set": "data.sampling",
    "save_forget_adapter": "extrapolation",
    "to_prompt_completion": "data",
    "tofu_protocol": "evaluation",
    "tokenize_rows": "data",
    "train_in_rounds": "trainer.rounds",
}

__all__ = [
    "Choice",
    "Evaluation",
    "EvaluationCallback",
    "Evaluator",
    "ExtrapolationConfig",
    "ExtrapolationTrainer",
    "Ledger",
    "LoraAdapter",
    "UnlearningConfig",
    "UnlearningError",
    "UnlearningTrainer",
    "check_sets",
    "choose_alpha",
    "custom_protocol",
    "extrapolate",
    "generate_answers",
    "load_rows",
    "read_log",
    "sample_retain_set",
    "save_forget_adapter",
    "to_prompt_completion",
    "tofu_protocol",
    "tokenize_rows",
    "train_in_rounds",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
