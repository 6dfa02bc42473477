"""TOFU (arXiv 2401.06121): forgetting authors that never were, with real authors and world facts beside them."""

from __future__ import annotations

from pathlib import Path

from hf_unlearn.data import load_rows, to_prompt_completion
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.protocols.base import EvaluationSet, Protocol
from hf_unlearn.evaluation.protocols.rows import first_rows, read_local, with_system_prompt


REPOSITORY = "locuslab/TOFU"
SPLITS = ("forget01", "forget05", "forget10")
MAX_NEW_TOKENS = 200

QUESTIONS = ("probability", "truth_ratio", "rouge", "refusal", "degenerate")
FACTS = (*QUESTIONS, "normalized_probability")
MEASURES = {
    "forget": (*QUESTIONS, "memorization", "membership"),
    "holdout": ("probability", "membership"),
    "retain": QUESTIONS,
    "real_authors": FACTS,
    "world_facts": FACTS,
}


def tofu_protocol(
    split: str = "forget10",
    *,
    chat: bool,
    data_dir: str | Path | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
) -> Protocol:
    """
    The protocol of TOFU: 200 new tokens, ROUGE-L recall, truth ratios, model utility, forget quality, membership.

    Args:
        split (`str`, *optional*, defaults to `"forget10"`):
            `"forget01"`, `"forget05"` or `"forget10"`.
        chat (`bool`):
            Whether the tokenizer has a chat template.
        data_dir (`str` or `Path`, *optional*):
            Folder with the sets as `<name>.json`, e.g. `forget10_perturbed.json`, `.jsonl` or `.parquet` (also in
            shards). Loaded from the Hub if not given.
        system_prompt (`str`, *optional*):
            System turn before each question; that of the chat template if not given.
        limit (`int`, *optional*):
            The first rows of each set only, for a trial.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: an unknown split, a missing set, a system prompt without a chat
            template, a `limit` below 1.
    """
    if split not in SPLITS:
        raise UnlearningError(f"TOFU has no forget split {split!r}. Choose from: {', '.join(SPLITS)}.")
    files = {
        "forget": f"{split}_perturbed",
        "holdout": split.replace("forget", "holdout"),
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    sets = {}
    for name, file in files.items():
        label = f"{name} set"
        if data_dir is None:
            rows = load_rows(REPOSITORY, config=file, name=label)
        else:
            rows = read_local(data_dir, [file], label)
        rows = to_prompt_completion(first_rows(rows, limit), name=label, chat=chat)
        sets[name] = EvaluationSet(with_system_prompt(rows, system_prompt), MEASURES[name], MAX_NEW_TOKENS)
    return Protocol("tofu", sets, question_figures, utility="model_utility")
