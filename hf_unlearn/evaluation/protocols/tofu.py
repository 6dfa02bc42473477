"""TOFU (arXiv 2401.06121): forgetting authors that never were, with real authors and world facts beside them."""

from __future__ import annotations

from pathlib import Path

import datasets

from hf_unlearn.data import load_rows, to_prompt_completion
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.protocols.base import EvaluationSet, Protocol


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
            Folder with the sets as `<name>.json`, e.g. `forget10_perturbed.json`. Loaded from the Hub if not given.
        system_prompt (`str`, *optional*):
            System turn before each question; that of the chat template if not given.
        limit (`int`, *optional*):
            The first rows of each set only, for a trial.
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
        rows = read_set(REPOSITORY, file, data_dir, name)
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        rows = to_prompt_completion(rows, name=f"{name} set", chat=chat)
        sets[name] = EvaluationSet(with_system_prompt(rows, system_prompt), MEASURES[name], MAX_NEW_TOKENS)
    return Protocol("tofu", sets, question_figures, utility="model_utility")


def read_set(repository: str, config: str, data_dir: str | Path | None, name: str) -> datasets.Dataset:
    """A set of a benchmark, from the Hub or from `<data_dir>/<config>.json`, `.jsonl` or `.parquet`."""
    if data_dir is None:
        return load_rows(repository, config=config, name=f"{name} set")
    files = [Path(data_dir) / f"{config}{suffix}" for suffix in (".json", ".jsonl", ".parquet")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise UnlearningError(
            f"The {name} set is missing: there is no {files[0].name} (nor .jsonl, .parquet) in {data_dir}. Check "
            f"--data_dir, or leave it out to load {repository} from the Hub."
        )
    return load_rows(file, name=f"{name} set")


def with_system_prompt(rows: datasets.Dataset, system_prompt: str | None) -> datasets.Dataset:
    """Rows whose conversations begin with a system turn."""
    if system_prompt is None:
        return rows
    if rows.features["prompt"] == datasets.Value("string"):
        raise UnlearningError(
            "--system_prompt needs conversations, and the tokenizer has no chat template. Leave it out."
        )
    turn = {"role": "system", "content": system_prompt}
    return rows.map(lambda row: {"prompt": [turn, *row["prompt"]]})
