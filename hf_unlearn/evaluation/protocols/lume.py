"""
LUME (Ramakrishna et al., arXiv 2502.15097), the benchmark of SemEval-2025 task 4 (arXiv 2504.02883): short stories,
made-up biographies with personal data, and real biographies, each to be recited and to be asked about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Literal, get_args

import datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from hf_unlearn.data import to_prompt_completion
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure, mean_figure, not_computed
from hf_unlearn.evaluation.metrics import rouge_l_recall
from hf_unlearn.evaluation.protocols.base import EvaluationSet, Protocol
from hf_unlearn.evaluation.protocols.figures import membership_figures, text_scores
from hf_unlearn.evaluation.protocols.rows import check_limit, first_rows, read_local, require_columns
from hf_unlearn.evaluation.results import Evaluation


Split = Literal["train", "validation"]

HUB_ID = "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
MAX_NEW_TOKENS = 256

SIDES = ("forget", "retain")
TASKS = ("task1", "task2", "task3")
MEASURES = {"completion": "rouge", "question": "exact_match"}  # by kind of prompt

_KINDS_IN_IDS = {"sc": "completion", "qa": "question"}
_KIND_IN_ID = re.compile(r"(sc|qa)\d+$")


def lume_protocol(
    data_dir: str | Path | None = None, split: Split = "validation", limit: int | None = None
) -> Protocol:
    """
    Regurgitation, knowledge, membership and utility of LUME, and the score by which SemEval-2025 task 4 was ranked.

    | set                            | rows                              | figure                                   |
    |--------------------------------|-----------------------------------|------------------------------------------|
    | `<side>_task<1..3>_completion` | beginnings of documents           | `<side>_task<1..3>_regurgitation`: mean ROUGE-L recall |
    | `<side>_task<1..3>_question`   | questions about them              | `<side>_task<1..3>_knowledge`: exact match, case and outer spaces aside |
    | `forget`, `holdout`            | documents seen and not seen in training | `membership_auc_loss`, `membership_score` |

    A side is `forget` or `retain`. Prompts are put to the model as they are, without template, and answered in up to
    256 tokens. For the other figures see [`lume_figures`].

    Args:
        data_dir (`str` or `Path`, *optional*): Local folder with `<side>_<split>`, `<split>/<side>` or, where there
            are no splits, `<side>`, as `.jsonl`, `.json` or `.parquet` (also in shards), in it or in `data/`; for
            membership also with `mia_data/member.jsonl` and `mia_data/nonmember.jsonl`. Defaults to the set of
            SemEval-2025 task 4 on the Hub, which has to be asked for.
        split (`"train"` or `"validation"`, *optional*, defaults to `"validation"`): Split.
        limit (`int`, *optional*): Rows per set, the first ones; all of them if `None`.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: an unknown split, a set that is missing, incomplete or of another shape,
            a `limit` below 1.
    """
    if split not in get_args(Split):
        raise UnlearningError(f"split={split!r} is no split of LUME. Use one of: {', '.join(get_args(Split))}.")
    check_limit(limit)
    folder = _download(split) if data_dir is None else Path(data_dir).expanduser()
    sets: dict[str, EvaluationSet] = {}
    for side in SIDES:
        sets |= _task_sets(folder, side, split, limit)
    if (folder / "mia_data").is_dir():
        sets["forget"] = _membership_set(folder, "member", limit)
        sets["holdout"] = _membership_set(folder, "nonmember", limit)
    return Protocol("lume", sets, lume_figures, utility="retain_score", forgetting="forget_task2_regurgitation")


# ---- Figures ----


def lume_figures(evaluation: Evaluation, retrained: Evaluation | None) -> dict[str, Figure]:
    """
    The twelve scores of the tasks, and

    - `task_aggregate`: their harmonic mean, those of the forget side as 1 − score;
    - `membership_score`: 1 − 2 · |AUC − 0.5| of the loss attack, 1 where members and non-members look alike;
    - `mmlu`: accuracy, taken from the figures of the evaluation, where [`run_harness`] puts it;
    - `final_score`: the mean of these three;
    - `retain_score`: the mean of the six scores of the retain side, ours, as a measure of utility that needs no MMLU.

    LUME compares with no retrained model.
    """
    figures: dict[str, Figure] = {}
    for prefix in (f"{side}_{task}" for side in SIDES for task in TASKS):
        recited = text_scores(evaluation, f"{prefix}_completion", rouge_l_recall)
        known = text_scores(evaluation, f"{prefix}_question", _same)
        figures[f"{prefix}_regurgitation"] = _mean(recited, "ROUGE-L recall")
        figures[f"{prefix}_knowledge"] = _mean(known, "exact match, case and outer spaces aside")
    retain = {name: figure for name, figure in figures.items() if name.startswith("retain_")}
    figures["retain_score"] = _combine(retain, fmean, "mean of the six scores of the retain side")
    inverted = {name: figure if name in retain else _inverted(figure) for name, figure in figures.items()}
    del inverted["retain_score"]
    figures["task_aggregate"] = _combine(inverted, harmonic_mean, "harmonic mean, forget side as 1 − score")
    missing = not_computed("there are no losses of members and non-members (mia_data)")
    figures["membership_auc_loss"] = membership_figures(evaluation, None).get("membership_auc_loss", missing)
    figures["membership_score"] = _membership_score(figures["membership_auc_loss"])
    figures["mmlu"] = evaluation.figures.get("mmlu", not_computed("lm-evaluation-harness was not run"))
    parts = {name: figures[name] for name in ("task_aggregate", "membership_score", "mmlu")}
    figures["final_score"] = _combine(parts, fmean, "mean of task_aggregate, membership_score and mmlu")
    return figures


def _same(answer: str, text: str) -> float:
    """LUME's exact match, to which "900-22-6238" and "900226238" differ, as they do not to other exact matches."""
    return float(text.strip().lower() == answer.strip().lower())


def _mean(scores: list[float] | None, note: str) -> Figure:
    return not_computed("its set was not evaluated") if scores is None else mean_figure(scores, note)


def _inverted(figure: Figure) -> Figure:
    return figure if figure.value is None else Figure(1 - figure.value, figure.n)


def _combine(parts: dict[str, Figure], mean: Callable[[Iterable[float]], float], note: str) -> Figure:
    missing = [name for name, figure in parts.items() if figure.value is None]
    if missing:
        return not_computed(f"{', '.join(missing)} missing")
    return Figure(mean(figure.value for figure in parts.values()), sum(part.n for part in parts.values()), note=note)


def _membership_score(auc: Figure) -> Figure:
    if auc.value is None:
        return auc
    return Figure(1 - 2 * abs(auc.value - 0.5), auc.n, note="1 − 2 · |AUC − 0.5| of the loss attack")


# ---- Rows ----


def _task_sets(folder: Path, side: str, split: Split, limit: int | None) -> dict[str, EvaluationSet]:
    stems = [f"{part}{stem}" for stem in (f"{side}_{split}", f"{split}/{side}", side) for part in ("", "data/")]
    name = f"LUME {side} set"
    rows: dict[str, list[dict[str, str]]] = {f"{side}_{task}_{kind}": [] for task in TASKS for kind in MEASURES}
    source = require_columns(read_local(folder, stems, name), ("id", "task", "input", "output"), name)
    for index, row in enumerate(source):
        found = _KIND_IN_ID.search(str(row["id"]))
        set_name = f"{side}_{str(row['task']).lower()}_{_KINDS_IN_IDS[found[1]] if found else ''}"
        if set_name not in rows:
            raise UnlearningError(
                f"{name}, row {index}: its task is {row['task']!r} and its id {row['id']!r}, but LUME has the "
                "tasks Task1, Task2 and Task3, and ids that end in sc or qa and a number. Check the file."
            )
        rows[set_name].append({"prompt": row["input"], "completion": row["output"]})
    empty = [set_name for set_name, members in rows.items() if not members]
    if empty:
        raise UnlearningError(f"The {name} has no rows for {', '.join(empty)}. Check that the file is complete.")
    return {
        set_name: EvaluationSet(
            to_prompt_completion(datasets.Dataset.from_list(members[:limit]), name=set_name, chat=False),
            (MEASURES[set_name.rsplit("_", 1)[1]],),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for set_name, members in rows.items()
    }


def _membership_set(folder: Path, stem: str, limit: int | None) -> EvaluationSet:
    name = f"LUME {stem} documents"
    documents = require_columns(read_local(folder / "mia_data", [stem], name), ("document",), name)
    texts = first_rows(documents.select_columns("document").rename_column("document", "text"), limit)
    return EvaluationSet(to_prompt_completion(texts, name=name, chat=False), ("membership",))


def _download(split: Split) -> Path:
    try:
        return Path(snapshot_download(HUB_ID, repo_type="dataset", allow_patterns=[f"data/*_{split}-*", "mia_data/*"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UnlearningError(
            f"LUME cannot be loaded from the Hub ({HUB_ID}): {error}. Access to it has to be asked for, and needs `hf "
            "auth login`; or pass the folder of a local copy as data_dir."
        ) from error
