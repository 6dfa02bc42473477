"""Sets of one's own: forget, retain and, best, hold-out rows of the same kind that the model never saw."""

from __future__ import annotations

import datasets

from hf_unlearn.data import to_prompt_completion
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.protocols.base import EvaluationSet, Protocol
from hf_unlearn.evaluation.protocols.rows import with_system_prompt


MEASURES = {
    "forget": ("probability", "memorization", "membership", "rouge", "refusal", "degenerate"),
    "retain": ("probability", "memorization", "kl", "rouge", "refusal", "degenerate"),
    "holdout": ("probability", "memorization", "membership"),
}


def custom_protocol(
    sets: dict[str, datasets.Dataset],
    *,
    chat: bool,
    system_prompt: str | None = None,
    max_length: int | None = None,
    max_new_tokens: int = 200,
) -> Protocol:
    """
    The protocol for sets of one's own.

    Args:
        sets (`dict[str, datasets.Dataset]`):
            Rows in any accepted shape ([`~hf_unlearn.data.to_prompt_completion`]) under the names `"forget"`,
            `"retain"` and, optionally, `"holdout"`: rows of the same kind as the forget set that the model never saw.
            Where rows carry wrong answers, truth ratios are measured too.
        chat (`bool`):
            Whether the tokenizer has a chat template.
        system_prompt (`str`, *optional*):
            System turn before each conversation; that of the chat template if not given.
        max_length (`int`, *optional*):
            Longest sequence, in tokens.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            Longest generated answer.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: a missing or an unknown set, rows of no accepted shape, a system prompt
            without a chat template.
    """
    for name in ("forget", "retain"):
        if name not in sets:
            raise UnlearningError(f"The custom protocol needs a {name} set; got {', '.join(sets) or 'none'}.")
    result = {}
    for name, rows in sets.items():
        if name not in MEASURES:
            raise UnlearningError(f"The custom protocol has no set {name!r}. Its sets are {', '.join(MEASURES)}.")
        rows = with_system_prompt(to_prompt_completion(rows, name=f"{name} set", chat=chat), system_prompt)
        measures = MEASURES[name] + (("truth_ratio",) if "wrong_completions" in rows.column_names else ())
        result[name] = EvaluationSet(rows, measures, max_new_tokens, max_length)
    return Protocol("custom", result, question_figures, utility="retain_probability")
