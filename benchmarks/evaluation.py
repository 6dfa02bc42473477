"""
Time the one-pass evaluator on a full TOFU protocol, and compare it with other ways to the same figures.

    export OMP_NUM_THREADS=1
    python benchmarks/evaluation_naive.py --model MODEL --data_dir TOFU --output naive.json      # one pass a metric
    python benchmarks/evaluation_peer.py --source open-unlearning --align_tokens --model MODEL --data_dir TOFU \
        --output peer.json                                                                       # another evaluator
    python benchmarks/evaluation.py --model MODEL --data_dir TOFU --naive naive.json --peer peer.json

Prints seconds, the tokens that had to be computed, and how near that is to the floor: 2 FLOP per parameter and token (the
LM head at answer tokens only) at the speed of a large matrix product on the same threads. Against the other files it prints the share of their time and
the largest differences of per-row values. `--num_alphas 8` also times a sweep of a LoRA adapter over that many α.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_unlearn import Evaluation, Evaluator, tofu_protocol
from hf_unlearn.data import encode_prompt
from hf_unlearn.evaluation.logs import ENTRIES


ATTACK_COLUMNS = {
    "mia_loss": "loss",
    "mia_zlib": "zlib_score",
    "mia_min_k": "min_k_score",
    "mia_min_k_plus_plus": "min_k_plus_plus_score",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or id of the model.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder of the TOFU sets as JSON files.")
    parser.add_argument("--split", default="forget01", help="Forget set.")
    parser.add_argument("--limit", type=int, help="Rows per set. All if not given.")
    parser.add_argument("--output", type=Path, help="File to write seconds and values to.")
    parser.add_argument("--earlier", type=Path, help="File written by an earlier run, to compare that one instead.")
    parser.add_argument("--naive", type=Path, help="Output of evaluation_naive.py on the same rows.")
    parser.add_argument("--peer", type=Path, help="Output of evaluation_peer.py on the same rows.")
    parser.add_argument("--num_alphas", type=int, default=0, help="α of a sweep to time.")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    protocol = tofu_protocol(args.split, chat=True, data_dir=args.data_dir, limit=args.limit)

    start = time.perf_counter(), time.process_time()
    evaluator = Evaluator(model, tokenizer, protocol)
    if args.earlier is not None:
        earlier = json.loads(args.earlier.read_text())
        evaluation, seconds = Evaluation.from_dict(earlier["evaluation"]), earlier["seconds"]
    else:
        evaluation = evaluator.evaluate()
        seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        report_speed(evaluator, evaluation, tokenizer, seconds, cpu_seconds)
    if args.output is not None:
        args.output.write_text(json.dumps({"seconds": seconds, "evaluation": evaluation.to_dict()}))

    if args.naive is not None:
        naive = json.loads(args.naive.read_text())
        print(
            f"one pass a metric: {naive['total_seconds']:.0f} s; this is {seconds / naive['total_seconds']:.2f} of it"
        )
        compare(naive["rows"], evaluation)
    if args.peer is not None:
        peer = json.loads(args.peer.read_text())
        print(f"open-unlearning: {peer['total_seconds']:.0f} s; this is {seconds / peer['total_seconds']:.2f} of it")
        compare(peer_columns(peer["log"]), evaluation)
    if args.num_alphas:
        time_sweep(model, tokenizer, protocol, args.num_alphas)


def report_speed(evaluator: Evaluator, evaluation: Evaluation, tokenizer, seconds: float, cpu_seconds: float) -> None:
    """Seconds against the floor."""
    scored = sum(row.num_tokens for prepared in evaluator._sets.values() for row in prepared.encoded)
    generated_only = sum(
        len(tokenizer(answer)["input_ids"]) + 1 for answers in evaluation.answers.values() for answer in answers
    )
    generated = generated_only + sum(
        len(encode_prompt(prompt, tokenizer))
        for name in evaluation.answers
        for prompt in evaluator.protocol.sets[name].rows["prompt"]
    )
    head = evaluator.model.get_output_embeddings().weight.numel()
    body = sum(
        p.numel() for n, p in evaluator.model.named_parameters() if "embed_tokens" not in n and "lm_head" not in n
    )
    projected = generated_only + sum(
        len(rest) - skipped
        for prepared in evaluator._sets.values()
        for row in prepared.encoded
        for rest, skipped in zip(row.rests, row.skipped, strict=True)
    )
    peak = matmul_speed()
    floor = 2 * (body * (scored + generated) + head * projected) / peak
    print(
        f"{seconds:.0f} s wall, {cpu_seconds:.0f} s of CPU: {scored} tokens scored, {generated} read and generated, "
        f"{(scored + generated) / seconds:.0f} tokens/s\n"
        f"floor: {floor:.0f} s at {peak / 1e9:.0f} GFLOP/s (a 2048 × 2048 × 2048 product, {torch.get_num_threads()} "
        f"threads); {floor / seconds:.0%} of the speed limit"
    )


def matmul_speed() -> float:
    """FLOP/s of a large fp32 matrix product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    torch.mm(a, b)
    start = time.perf_counter()
    for _ in range(5):
        torch.mm(a, b)
    return 5 * 2 * 2048**3 / (time.perf_counter() - start)


def peer_columns(log: dict) -> dict[str, dict[str, list]]:
    """Per-row values of an open-unlearning log under this project's names."""
    columns: dict[str, dict[str, list]] = {}
    for entry, (name, fields) in ENTRIES.items():
        if entry in log:
            rows = log[entry]["value_by_index"].values()
            for key, column in fields.items():
                columns.setdefault(name, {})[column] = [row[key] for row in rows]
    for entry, column in ATTACK_COLUMNS.items():
        for name in ("forget", "holdout"):
            columns.setdefault(name, {})[column] = [
                row["score"] for row in log[entry][name]["value_by_index"].values()
            ]
    return columns


def compare(others: dict[str, dict[str, list]], evaluation: Evaluation) -> None:
    """Print the largest difference of every column, relative where values are above 1."""
    for name, columns in others.items():
        for column, values in columns.items():
            if column == "generation":
                pairs = zip(values, evaluation.answers[name], strict=True)
                print(f"  {name} answers: {sum(a != b for a, b in pairs)} of {len(values)} differ")
            elif column in evaluation.rows[name] and column != "ground_truth":
                ours, theirs = np.asarray(evaluation.rows[name][column]), np.asarray(values)
                difference = np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))
                print(
                    f"  {name} {column}: {difference.max():.1e} (mean {ours.mean():.6g}, theirs {theirs.mean():.6g})"
                )


def time_sweep(model: PreTrainedModel, tokenizer, protocol, num_alphas: int) -> None:
    """One evaluation of a model with an adapter, against a sweep over several α."""
    peft_model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-6)  # so that answers are as long at every α
    start = time.perf_counter()
    Evaluator(peft_model, tokenizer, protocol).evaluate(0.125)
    one = time.perf_counter() - start
    start = time.perf_counter()
    evaluator = Evaluator(peft_model, tokenizer, protocol)
    for number in range(num_alphas):
        evaluator.evaluate((number + 1) / num_alphas)
    seconds = time.perf_counter() - start
    print(
        f"one evaluation with an adapter: {one:.0f} s; {num_alphas} α: {seconds:.0f} s, {seconds / one:.2f} times that"
    )


if __name__ == "__main__":
    main()
