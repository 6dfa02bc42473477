"""
The TOFU figures the plain way: one pass over the rows for every metric, with the logits of the whole vocabulary.

What one writes first with Transformers, and the baseline of this project's one-pass evaluator. Rows are tokenised by
`hf_unlearn.data`, so the values of both can be compared.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_naive.py --model SmolLM2-135M-Instruct --data_dir data/tofu \
        --split forget01 --batch_size 1 --output naive.json

The output has `rows` (per set and column, the value of each row), `answers`, `figures`, `seconds` (per set and metric)
and `total_seconds` (all but loading the model).
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import datasets
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data import encode_pair, encode_prompt, load_rows, to_prompt_completion


K = 0.4  # share of the tokens that min-k and min-k++ look at
ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
UTILITY_SETS = ("retain", "real_authors", "world_facts")

Message = dict[str, str]
Score = Callable[[torch.Tensor, torch.Tensor], float]  # answer logits (n, V), answer ids (n,) → value of the row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or id of the model.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder of the TOFU sets as JSON files.")
    parser.add_argument("--split", default="forget01", help="Forget set.")
    parser.add_argument("--limit", type=int, help="Rows per set. All if not given.")
    parser.add_argument("--batch_size", type=int, default=1, help="Rows in a batch.")
    parser.add_argument("--output", type=Path, default=Path("naive.json"), help="File to write.")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    files = {
        "forget": f"{args.split}_perturbed",
        "holdout": args.split.replace("forget", "holdout"),
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    start = time.perf_counter()
    content: dict[str, Any] = {"rows": {}, "answers": {}, "seconds": {}}
    for name, file in files.items():
        rows = to_prompt_completion(load_rows(args.data_dir / f"{file}.json"), name=name, chat=True)
        rows = rows.select(range(min(len(rows), args.limit or len(rows))))
        measured = NaiveEvaluation(model, tokenizer, rows, args.batch_size)
        if name == "holdout":
            measured.membership()
        else:
            measured.answers_and_wrong_answers()
            measured.rouge()
        if name == "forget":
            measured.memorization()
            measured.membership()
        content["rows"][name], content["answers"][name] = measured.columns, measured.answers
        content["seconds"] |= {f"{name}_{metric}": seconds for metric, seconds in measured.seconds.items()}
    content["figures"] = compute_figures(content["rows"])
    content["total_seconds"] = time.perf_counter() - start
    args.output.write_text(json.dumps(content, indent=1))
    print(json.dumps({key: content[key] for key in ("figures", "seconds", "total_seconds")}, indent=1))


class NaiveEvaluation:
    """The columns of one set; every method makes its own passes."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, batch_size: int
    ):
        self.model, self.tokenizer, self.rows, self.batch_size = model, tokenizer, rows, batch_size
        self.columns: dict[str, list[Any]] = {"row": rows["row"][:]}
        self.answers: list[str] = []
        self.seconds: dict[str, float] = {}

    def answers_and_wrong_answers(self) -> None:
        columns, completions = self.columns, self.rows["completion"]
        columns["num_tokens"] = [int((labels != -100).sum()) for _, labels in self._encode(completions)]
        columns["loss"] = correct = self._pass("probability", completions, mean_loss)
        columns["probability"] = [float(torch.tensor(-loss).exp()) for loss in columns["loss"]]
        if "paraphrased_completion" in self.rows.column_names:
            correct = self._pass("paraphrased_probability", self.rows["paraphrased_completion"], mean_loss)
            columns["paraphrased_loss"] = correct
        answers = zip(*self.rows["wrong_completions"], strict=True)
        passes = [self._pass(f"wrong_probability_{i}", list(answer), mean_loss) for i, answer in enumerate(answers)]
        columns["wrong_losses"] = [list(losses) for losses in zip(*passes, strict=True)]
        wrong = torch.tensor(columns["wrong_losses"], dtype=torch.float64)
        right = torch.tensor(columns["loss"], dtype=torch.float64)
        columns["normalized_probability"] = (1 / (1 + (right[:, None] - wrong).exp().sum(1))).tolist()
        columns["truth_ratio"] = (torch.tensor(correct, dtype=torch.float64) - wrong.mean(1)).exp().tolist()

    def memorization(self) -> None:
        for name, score in {"exact_memorization": share_right, "extraction_strength": share_extracted}.items():
            self.columns[name] = self._pass(name, self.rows["completion"], score)

    def membership(self) -> None:
        columns, completions = self.columns, self.rows["completion"]
        columns["loss"] = self._pass("membership_loss", completions, mean_loss)
        losses = self._pass("membership_zlib", completions, mean_loss)
        sizes = [len(zlib.compress(completion[0]["content"].encode())) for completion in completions]
        columns["zlib_score"] = [loss / size for loss, size in zip(losses, sizes, strict=True)]
        columns["min_k_score"] = self._pass("membership_min_k", completions, min_k)
        columns["min_k_plus_plus_score"] = self._pass("membership_min_k_plus_plus", completions, min_k_plus_plus)

    def rouge(self) -> None:
        start = time.perf_counter()
        for at in range(0, len(self.rows), self.batch_size):
            self.answers += self._generate(self.rows["prompt"][at : at + self.batch_size])
        scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
        answers = zip(self.rows["completion"], self.answers, strict=True)
        scores = [scorer.score(completion[0]["content"], answer) for completion, answer in answers]
        self.columns["rouge_1_recall"] = [score["rouge1"].recall for score in scores]
        self.columns["rouge_l_recall"] = [score["rougeL"].recall for score in scores]
        self.columns["rouge_l_f1"] = [score["rougeL"].fmeasure for score in scores]
        self.seconds["rouge"] = time.perf_counter() - start

    def _pass(self, metric: str, completions: list[list[Message]], score: Score) -> list[float]:
        start = time.perf_counter()
        encoded, values = list(self._encode(completions)), []
        for at in range(0, len(encoded), self.batch_size):
            ids, labels = zip(*encoded[at : at + self.batch_size], strict=True)
            mask = pad([torch.ones_like(row) for row in ids], 0)
            with torch.no_grad():
                logits = self.model(input_ids=pad(ids, 0), attention_mask=mask).logits
            for row_logits, row_labels in zip(logits[:, :-1], pad(labels, -100)[:, 1:], strict=True):
                is_answer = row_labels != -100
                values.append(score(row_logits[is_answer], row_labels[is_answer]))
        self.seconds[metric] = time.perf_counter() - start
        return values

    def _encode(self, completions: list[list[Message]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for prompt, completion in zip(self.rows["prompt"], completions, strict=True):
            pair = encode_pair(prompt, completion, self.tokenizer)
            yield torch.tensor(pair["input_ids"]), torch.tensor(pair["labels"])

    def _generate(self, prompts: list[list[Message]]) -> list[str]:
        eos = self.tokenizer.eos_token_id
        encoded = [torch.tensor(encode_prompt(prompt, self.tokenizer)) for prompt in prompts]
        ids = pad(encoded, eos, side="left")
        mask = pad([torch.ones_like(row) for row in encoded], 0, side="left")
        output = self.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=200, pad_token_id=eos)
        texts = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


def pad(rows: list[torch.Tensor], value: int, side: str = "right") -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


# ---- Scores of a row; all but the loss leave out EOS, the last token ----


def mean_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits, ids))


def share_right(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float((logits.argmax(-1) == ids)[:-1].float().mean())


def share_extracted(logits: torch.Tensor, ids: torch.Tensor) -> float:
    is_right = (logits.argmax(-1) == ids)[:-1]
    return float(is_right.flip(0).long().cumprod(0).float().mean())


def min_k(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return -mean_of_lowest(logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)[:-1])


def min_k_plus_plus(logits: torch.Tensor, ids: torch.Tensor) -> float:
    log_probs = logits.log_softmax(-1)
    mean = (log_probs.exp() * log_probs).sum(-1)
    variance = (log_probs.exp() * log_probs**2).sum(-1) - mean**2
    scores = (log_probs.gather(1, ids[:, None]).squeeze(1) - mean) / variance.clamp(min=1e-6).sqrt()
    return -mean_of_lowest(scores[:-1])


def mean_of_lowest(values: torch.Tensor) -> float:
    return float(values.sort().values[: max(1, int(len(values) * K))].mean())


# ---- Figures ----


def compute_figures(rows: dict[str, dict[str, list[Any]]]) -> dict[str, float]:
    figures, utility = {}, []
    for name in UTILITY_SETS:
        columns = rows[name]
        utility += [
            fmean(columns["probability" if name == "retain" else "normalized_probability"]),
            fmean(columns["rouge_l_recall"]),
            fmean(max(0, 1 - ratio) for ratio in columns["truth_ratio"]),
        ]
    forget, holdout = rows["forget"], rows["holdout"]
    figures["model_utility"] = harmonic_mean(utility)
    figures["forget_truth_ratio"] = fmean(min(ratio, 1 / ratio) for ratio in forget["truth_ratio"])
    for name in ("probability", "rouge_l_recall", "exact_memorization", "extraction_strength"):
        figures[f"forget_{name}"] = fmean(forget[name])
    for attack in ATTACKS:
        column = attack if attack == "loss" else f"{attack}_score"
        pairs = [(member, other) for member in forget[column] for other in holdout[column]]
        figures[f"membership_auc_{attack}"] = fmean((a < b) + (a == b) / 2 for a, b in pairs)
    return figures


if __name__ == "__main__":
    main()
