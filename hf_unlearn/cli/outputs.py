"""What the commands that evaluate write and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from hf_unlearn.data.formats import text_of
from hf_unlearn.evaluation import (
    Choice,
    Evaluation,
    Protocol,
    RowText,
    collapse,
    write_open_unlearning,
    write_report,
    write_tables,
)


OUTPUTS = ("report.html", "evaluation.json", "figures.csv", "rows.csv", "evaluation.png")

SECURITY_NOTE = (
    "Security: the base model together with the forget model or the forget adapter reveals ΔW, and θ_ref + ΔW is the "
    "model that memorised the forget set. Where the base is public, publishing the result publishes the secret."
)
PRIVACY_NOTE = "Privacy: this report contains rows of the forget set and what the model says to them. Treat it like the forget set."

MAX_FIGURES = 8  # that fit a terminal of 80 columns
TABLE_FIGURES = {  # the first of them that there are
    "model_utility": "model\nutility",
    "forget_quality": "forget\nquality",
    "final_score": "final\nscore",
    "task_aggregate": "task\naggr.",
    "retain_score": "retain\nscore",
    "membership_auc_loss": "AUC",
    "forget_probability": "forget\nprob",
    "retain_probability": "retain\nprob",
    "holdout_probability": "holdout\nprob",
    "forget_extraction_strength": "forget\nES",
    "forget_rouge_l_recall": "forget\nROUGE",
    "retain_rouge_l_recall": "retain\nROUGE",
    "privleak": "Priv\nLeak",
    "verbmem": "verb\nmem",
    "knowmem_forget": "know\nforget",
    "knowmem_retain": "know\nretain",
    "wmdp_bio": "WMDP\nbio",
    "wmdp_chem": "WMDP\nchem",
    "wmdp_cyber": "WMDP\ncyber",
    "mmlu": "MMLU",
}


def save_evaluations(
    folder: Path,
    protocol: Protocol,
    evaluations: list[Evaluation],
    choice: Choice | None = None,
    retrained: Evaluation | None = None,
    facts: dict[str, str] | None = None,
    log_history: list[dict[str, Any]] | None = None,
    notes: list[str] | None = None,
) -> None:
    """
    Write the tables, the picture, the report and, for TOFU, the log in open-unlearning's shape.

    Args:
        folder (`Path`): Where to write.
        protocol ([`Protocol`]): What was evaluated. Its rows are shown in the report.
        evaluations (list of [`Evaluation`]): At each α, by rising α, or one of a model as it is.
        choice ([`Choice`], *optional*): The chosen α, one of those evaluated; written as `choice.json` too.
        retrained ([`Evaluation`], *optional*): Log of a model retrained without the forget set, to be shown beside.
        facts (`dict[str, str]`, *optional*): How the result came about, for the report.
        log_history (`list[dict]`, *optional*): `trainer.state.log_history`, for the report's training curves.
        notes (list of `str`, *optional*): Paragraphs for the report's end.
    """
    write_tables(folder, evaluations, choice, retrained)
    if choice is not None:
        (folder / "choice.json").write_text(
            json.dumps(choice.to_dict(), indent=2, ensure_ascii=False), encoding="utf-8"
        )
    texts = {
        name: [
            RowText(text_of(prompt), text_of(completion))
            for prompt, completion in zip(content.rows["prompt"], content.rows["completion"], strict=True)
        ]
        for name, content in protocol.sets.items()
    }
    write_report(
        folder / "report.html",
        title="Unlearning report" if choice is not None else "Evaluation report",
        evaluations=evaluations,
        texts=texts,
        choice=choice,
        retrained=retrained,
        facts=facts,
        log_history=log_history,
        notes=[*(notes or []), *([PRIVACY_NOTE] if texts else [])],
    )
    if protocol.name == "tofu":
        chosen = choice.alpha if choice is not None else evaluations[-1].alpha
        shown = next(evaluation for evaluation in evaluations if evaluation.alpha == chosen)
        if shown.answers:
            write_open_unlearning(shown, folder / "TOFU_EVAL.json")


def describe_evaluations(evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """What `evaluation.json` has of each evaluation, without rows and answers, for `--json`."""
    return [
        {name: value for name, value in evaluation.to_dict().items() if name not in ("rows", "answers")}
        for evaluation in evaluations
    ]


def describe_rows(protocol: Protocol) -> str:
    """Name of a protocol and the number of rows of its sets, in words."""
    counts = ", ".join(f"{len(content.rows)} {name}" for name, content in protocol.sets.items())
    return f"{protocol.name} on {counts + ' rows' if counts else 'its tasks'}"


def figures_table(evaluations: list[Evaluation], choice: Choice | None = None) -> Table:
    """The main figures, one line an α, the chosen one marked; `figures.csv` has all of them."""
    names = [name for name in TABLE_FIGURES if any(evaluation.value(name) is not None for evaluation in evaluations)]
    names = names[:MAX_FIGURES]
    headers = [Column(title, justify="right", no_wrap=True) for title in ["α", *(TABLE_FIGURES[n] for n in names)]]
    table = Table(*headers, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for evaluation in evaluations:
        chosen = choice is not None and evaluation.alpha == choice.alpha
        values = [evaluation.value(name) for name in names]
        cells = ["" if value is None else f"{value:.3g}" for value in values]
        alpha = "–" if evaluation.alpha is None else f"{evaluation.alpha:.3g}"
        table.add_row(("* " if chosen else "") + alpha, *cells, style="bold" if chosen else None)
    return table


def collapses(evaluations: list[Evaluation], protocol: Protocol) -> list[str]:
    """
    Models that have collapsed, in words.

    Args:
        evaluations (list of [`Evaluation`]): At each α, or one of a model as it is. The one at α = 0, if any, is what the
            utility of the others is measured against.
        protocol ([`Protocol`]): Names the figure that is the utility.

    Returns:
        `list[str]`: one sentence for each model that has collapsed.
    """
    reference = next((evaluation for evaluation in evaluations if evaluation.alpha == 0), None)
    found = []
    for evaluation in evaluations:
        remark = collapse(evaluation, reference, protocol.utility)
        if remark is not None:
            found.append((f"α = {evaluation.alpha:g} " if evaluation.alpha is not None else "") + f"failed: {remark}.")
    return found
