"""
MUSE (Shi et al., arXiv 2407.06460): does the model still recite a corpus, know what it says, or betray that it was
trained on it? For News (BBC articles) and Books (the Harry Potter series).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args

import datasets

from hf_unlearn.data import load_rows, to_prompt_completion
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure, mean_figure, not_computed
from hf_unlearn.evaluation.metrics import rouge
from hf_unlearn.evaluation.protocols.base import EvaluationSet, Protocol
from hf_unlearn.evaluation.protocols.figures import membership_figures, text_scores
from hf_unlearn.evaluation.protocols.rows import first_rows, read_local, require_columns
from hf_unlearn.evaluation.results import Evaluation


Corpus = Literal["News", "Books"]
Request = Literal["scal", "sust"]

VERBATIM_TOKENS = 128
KNOWLEDGE_TOKENS = 32
MAX_LENGTH = 2048
REQUESTS = 4

_COLUMNS = {
    "verbmem": ("prompt", "gt"),
    "knowmem": ("question", "answer"),
    "privleak": ("text",),
    "scal": ("text",),
    "sust": ("text",),
}
_ANSWER_END = re.compile(r"\n\n|\nQuestion|Question:")


def muse_protocol(corpus: Corpus, data_dir: str | Path | None = None, limit: int | None = None) -> Protocol:
    """
    Verbatim memorisation, knowledge memorisation, privacy leakage and utility of MUSE.

    | set                 | rows (configuration, split)          | generated | figure                              |
    |---------------------|--------------------------------------|-----------|-------------------------------------|
    | `forget_verbatim`   | `verbmem`, `forget`                  | 128       | `verbmem`                           |
    | `forget_knowledge`  | `knowmem`, `forget_qa`               | 32        | `knowmem_forget`                    |
    | `retain_knowledge`  | `knowmem`, `retain_qa`               | 32        | `knowmem_retain`, the utility       |
    | `forget`, `holdout` | `privleak`, `forget` and `holdout`   |           | `membership_auc_<attack>`, `privleak` |

    The first three figures are mean ROUGE-L F1 in per cent, as the benchmark prints them; its own code does not stem
    words, ours does. Questions follow the ten examples of `forget_qa_icl` or `retain_qa_icl`, and [`first_answer`] of
    what is generated is scored, since a base model goes on with questions of its own.

    PrivLeak compares with the retrained model that is given, else with an AUC of 0.5. The published values compare with
    the AUC of Llama-2-7B retrained by the authors: 1 − AUC is 0.4772 for News and 0.5393 for Books.

    Args:
        corpus (`"News"` or `"Books"`): Corpus.
        data_dir (`str` or `Path`, *optional*): Local folder with the layout of the benchmark,
            `<configuration>/<split>` as `.json` (rows, or an array of texts), `.jsonl` or `.parquet` (also in shards,
            `<split>-00000-of-00001.parquet`). Defaults to `muse-bench/MUSE-<corpus>` on the Hub.
        limit (`int`, *optional*): Rows per set, the first ones; all of them if `None`. Examples are never cut.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: an unknown corpus, a set that is missing or of another shape, a `limit`
            below 1.
    """
    _check_corpus(corpus)
    sets = {
        "forget_verbatim": EvaluationSet(
            _verbatim_rows(corpus, data_dir, limit), ("rouge",), max_new_tokens=VERBATIM_TOKENS
        )
    }
    for side in ("forget", "retain"):
        rows = _knowledge_rows(corpus, data_dir, side, limit)
        sets[f"{side}_knowledge"] = EvaluationSet(rows, ("rouge",), max_new_tokens=KNOWLEDGE_TOKENS)
    for split in ("forget", "holdout"):
        rows = to_prompt_completion(
            _read(corpus, data_dir, "privleak", split, limit), name=f"MUSE {split} texts", chat=False
        )
        sets[split] = EvaluationSet(rows, ("membership",), max_length=MAX_LENGTH)
    return Protocol(
        f"muse-{corpus.lower()}", sets, muse_figures, utility="knowmem_retain", forgetting="knowmem_forget"
    )


def muse_request(corpus: Corpus, kind: Request, number: int, data_dir: str | Path | None = None) -> datasets.Dataset:
    """
    Texts to forget in one of the four unlearning requests for scalability or sustainability, column `text`.

    Args:
        corpus (`"News"` or `"Books"`): Corpus. The benchmark has requests for News only.
        kind (`"scal"` or `"sust"`): `"scal"`: request 2 holds request 1 and as much again, and so on. `"sust"`:
            requests that share no text, to be forgotten one after the other.
        number (`int`): 1 to 4.
        data_dir (`str` or `Path`, *optional*): As for [`muse_protocol`].
    """
    _check_corpus(corpus)
    if kind not in get_args(Request):
        raise UnlearningError(
            f"kind={kind!r} is no kind of request of MUSE. Use one of: {', '.join(get_args(Request))}."
        )
    if number not in range(1, REQUESTS + 1):
        raise UnlearningError(f"number={number} is no request of MUSE: they are numbered from 1 to {REQUESTS}.")
    if corpus != "News":
        raise UnlearningError(f"MUSE has no {kind} requests for {corpus}. Use the corpus 'News'.")
    return _read(corpus, data_dir, kind, f"forget_{number}")


def first_answer(text: str) -> str:
    """
    What a base model generated as answer to the question put to it: all before a blank line or a further question.

    `knowmem_forget` and `knowmem_retain` are of this part of the generated text, `verbmem` of all of it. The column
    `rouge_l_f1` and the answers of an evaluation always have all of it.
    """
    return _ANSWER_END.split(text, maxsplit=1)[0]


# ---- Figures ----


def muse_figures(evaluation: Evaluation, retrained: Evaluation | None) -> dict[str, Figure]:
    """`verbmem`, `knowmem_forget`, `knowmem_retain`, `membership_auc_<attack>` and `privleak`."""
    verbatim = text_scores(evaluation, "forget_verbatim", lambda *texts: rouge(*texts).rouge_l_f1)
    knowledge = {
        side: text_scores(
            evaluation, f"{side}_knowledge", lambda answer, text: rouge(answer, first_answer(text)).rouge_l_f1
        )
        for side in ("forget", "retain")
    }
    return {
        "verbmem": _percent(verbatim, "the generated text"),
        "knowmem_forget": _percent(knowledge["forget"], "the first answer generated"),
        "knowmem_retain": _percent(knowledge["retain"], "the first answer generated"),
        "privleak": not_computed("the sets forget and holdout have no min-k scores"),
    } | membership_figures(evaluation, retrained)


def _percent(scores: list[float] | None, what: str) -> Figure:
    if scores is None:
        return not_computed("its set was not evaluated")
    return mean_figure([100 * score for score in scores], note=f"ROUGE-L F1 of {what}, stemmed, in per cent")


# ---- Rows ----


def _verbatim_rows(corpus: Corpus, data_dir: str | Path | None, limit: int | None) -> datasets.Dataset:
    rows = _read(corpus, data_dir, "verbmem", "forget", limit).rename_column("gt", "completion")
    return to_prompt_completion(rows, name="MUSE verbatim set", chat=False)


def _knowledge_rows(corpus: Corpus, data_dir: str | Path | None, side: str, limit: int | None) -> datasets.Dataset:
    """Prompts end with a space after `Answer:`, as the benchmark's do."""
    examples = "".join(
        f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
        for row in _read(corpus, data_dir, "knowmem", f"{side}_qa_icl")
    )
    rows = [
        {"prompt": f"{examples}Question: {row['question']}\nAnswer: ", "completion": row["answer"]}
        for row in _read(corpus, data_dir, "knowmem", f"{side}_qa", limit)
    ]
    return to_prompt_completion(datasets.Dataset.from_list(rows), name=f"MUSE {side} questions", chat=False)


def _check_corpus(corpus: str) -> None:
    if corpus not in get_args(Corpus):
        raise UnlearningError(f"corpus={corpus!r} is no corpus of MUSE. Use one of: {', '.join(get_args(Corpus))}.")


def _read(
    corpus: Corpus, data_dir: str | Path | None, config: str, split: str, limit: int | None = None
) -> datasets.Dataset:
    name = f"MUSE set {config}/{split}"
    if data_dir is None:
        rows = load_rows(f"muse-bench/MUSE-{corpus}", config=config, split=split, name=name)
    else:
        rows = read_local(data_dir, [f"{config}/{split}"], name)
    return first_rows(require_columns(rows, _COLUMNS[config], name), limit)
