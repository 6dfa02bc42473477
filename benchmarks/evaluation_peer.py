"""
Time open-unlearning's own TOFU evaluator on local files, and keep its per-row values.

Runs `evals.TOFUEvaluator` of a checkout of https://github.com/locuslab/open-unlearning, unchanged and from its own
configuration, with the metrics switched on that `configs/eval/tofu.yaml` leaves out and this project computes. Only what
the evaluator is given comes from here: the model in fp32, rows from local JSON instead of the Hub, and token ids as a
list where Transformers 5 returns a dictionary.

    pip install hydra-core hydra-colorlog scikit-learn rouge_score
    OMP_NUM_THREADS=1 python benchmarks/evaluation_peer.py --source open-unlearning --model SmolLM2-135M-Instruct \
        --data_dir data/tofu --split forget01 --output peer.json

The output has `log` (what the evaluator writes to TOFU_EVAL.json), `summary` (TOFU_SUMMARY.json), `seconds` (per metric,
without the metrics that it is computed from) and `total_seconds` (all but loading the model).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


SWITCHED_ON = ("exact_memorization", "mia_min_k_plus_plus", "mia_min_k", "mia_loss", "mia_zlib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="Checkout of open-unlearning.")
    parser.add_argument("--model", required=True, help="Folder or id of the model.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder of the TOFU sets as JSON files.")
    parser.add_argument("--split", default="forget01", help="Forget set.")
    parser.add_argument("--limit", type=int, help="Rows per set. All if not given.")
    parser.add_argument("--batch_size", type=int, default=32, help="Rows in a batch.")
    parser.add_argument("--output", type=Path, default=Path("peer.json"), help="File to write.")
    parser.add_argument(
        "--align_tokens",
        action="store_true",
        help="Give the evaluator the tokens that this project scores: nothing after the last EOS, and the unknown token "
        "as padding where that is EOS. Not how the tool runs by itself; for comparing values.",
    )
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return_lists(tokenizer, args.align_tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    read_local_sets(args.data_dir, args.limit)

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        evaluator, seconds = build_evaluator(args.source, args.split, args.batch_size, folder)
        summary = evaluator.evaluate(model, tokenizer=tokenizer, template_args={"apply_chat_template": True})
        log = json.loads((Path(folder) / "TOFU_EVAL.json").read_text())
    total = time.perf_counter() - start

    content = {"log": log, "summary": summary, "seconds": seconds, "total_seconds": total}
    args.output.write_text(json.dumps(content, indent=1))
    print(json.dumps({"summary": summary, "seconds": seconds, "total_seconds": total}, indent=1))


def build_evaluator(source: Path, split: str, batch_size: int, folder: str) -> tuple[Any, dict[str, float]]:
    """The evaluator of the checkout, from its own configuration, and the dictionary that it enters its times into."""
    sys.path.insert(0, str(source / "src"))
    sys.modules["evals.lm_eval"] = types.SimpleNamespace(LMEvalEvaluator=type("LMEvalEvaluator", (), {}))  # not used
    from evals import get_evaluator
    from evals.metrics.base import UnlearningMetric
    from hydra import compose, initialize_config_dir

    overrides = [
        "experiment=eval/tofu/default",
        f"+eval/tofu_metrics=[{','.join(SWITCHED_ON)}]",
        f"forget_split={split}",
        f"holdout_split={split.replace('forget', 'holdout')}",
        f"eval.tofu.batch_size={batch_size}",
    ]
    with initialize_config_dir(str((source / "configs").resolve()), version_base=None):
        config = compose("eval.yaml", overrides).eval.tofu
    config.output_dir = folder
    seconds: dict[str, float] = {}
    UnlearningMetric.evaluate = _timed(UnlearningMetric.evaluate, seconds)
    return get_evaluator("tofu", config), seconds


def _timed(evaluate: Callable[..., Any], seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(self: Any, model: Any, metric_name: str, cache: dict[str, Any], **kwargs: Any) -> Any:
        start, before = time.perf_counter(), sum(seconds.values())
        results = evaluate(self, model, metric_name, cache, **kwargs)
        of_others = sum(seconds.values()) - before
        seconds[metric_name] = time.perf_counter() - start - of_others
        return results

    return timed


def read_local_sets(data_dir: Path, limit: int | None) -> None:
    """Let `datasets.load_dataset` read the TOFU sets from JSON files, and no more than `limit` rows of each."""
    load_dataset = datasets.load_dataset

    def load_local(path: str, name: str, split: str) -> datasets.Dataset:
        rows = load_dataset("json", data_files=str(data_dir / f"{name}.json"), split=split)
        return rows if limit is None else rows.select(range(min(limit, len(rows))))

    datasets.load_dataset = load_local


def return_lists(tokenizer: PreTrainedTokenizerBase, align_tokens: bool) -> None:
    """Let the chat template give lists of token ids, and with `align_tokens` those that this project scores."""
    apply_chat_template = tokenizer.apply_chat_template
    if align_tokens and tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = tokenizer.unk_token

    def apply(chat: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool, **kwargs: Any) -> Any:
        kwargs |= {"tokenize": tokenize, "add_generation_prompt": add_generation_prompt}
        ids = apply_chat_template(chat, **kwargs, return_dict=False)
        if align_tokens and tokenize and not add_generation_prompt:
            ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
        return ids

    tokenizer.apply_chat_template = apply


if __name__ == "__main__":
    main()
