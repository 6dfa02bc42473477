"""
How a training step and a sweep grow: time and memory against tokens a row, batch, vocabulary, model size and number of α.

    OMP_NUM_THREADS=2 python benchmarks/growth.py --model SmolLM2-135M-Instruct

Models are Llama-shaped with random weights, the largest of the size of SmolLM2-135M; `--model` gives the tokenizer, and no
more. Each point is a process of its own, whose allocator returns what is freed at once. Prints a Markdown table: an exponent
is the slope of a straight line through the logarithms, so 1 is proportional and 0 does not grow.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import disable_progress_bars
from peft import LoraConfig, get_peft_model
from training_step import Setting, apart, build_trainer, make_rows, measure, return_freed_memory, time_steps
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from hf_unlearn import Evaluator, custom_protocol
from hf_unlearn.data.loading import load_rows


@dataclass(frozen=True)
class Size:
    """Shape of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 49152

    def build(self) -> LlamaForCausalLM:
        """The model, with random weights."""
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=max(1, self.heads // 3),
            vocab_size=self.vocabulary,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval()


SMALL = Size(192, 512, 12, 3)
SIZES = (SMALL, Size(288, 768, 16, 3), Size(384, 1024, 24, 6), Size(576, 1536, 30, 9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or id of the tokenizer.")
    parser.add_argument("--steps", type=int, default=3, help="Steps of each point, the first of which is not timed.")
    args = parser.parse_args()

    plain = Setting(4, 128, checkpointing=False)
    axes = {
        "tokens a row": [(length, SMALL, replace(plain, length=length)) for length in (64, 128, 256, 512)],
        "rows": [(2 * pairs, SMALL, replace(plain, pairs=pairs)) for pairs in (2, 4, 8, 16)],
        "vocabulary": [(size, replace(SMALL, vocabulary=size), plain) for size in (49152, 98304, 196608, 262144)],
        "parameters": [(None, size, plain) for size in SIZES],
    }
    print(
        "| against | values | seconds | exponent | memory beyond the model, MB | exponent |\n|---|---|---|---|---|---|"
    )
    for name, points in axes.items():
        results = [apart(train, size, setting, args.model, args.steps) for _, size, setting in points]
        values = [value or result["parameters"] for (value, *_), result in zip(points, results, strict=True)]
        print_row(name, values, [r["seconds"] for r in results], [r["beyond"] for r in results])
    counts = (1, 2, 4, 8)
    results = [apart(sweep, SMALL, count, args.model) for count in counts]
    print_row("α in a sweep", counts, [r["seconds"] for r in results], [r["beyond"] for r in results])


def train(size: Size, setting: Setting, tokenizer_name: str, steps: int) -> dict[str, float]:
    """Seconds of a step of extrapolation training, and its memory beyond the loaded model."""
    return_freed_memory()
    logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer, model = AutoTokenizer.from_pretrained(tokenizer_name), size.build()
    rows = make_rows(tokenizer, setting)
    with tempfile.TemporaryDirectory() as folder:
        parts = "ours", setting, model, tokenizer, *rows, folder, steps
        result = measure(model, lambda: time_steps(build_trainer(*parts)))
    return {
        "parameters": sum(
            p.numel() for name, p in model.named_parameters() if "layers" in name and "lora_" not in name
        ),
        "seconds": statistics.median(result["seconds"]),
        "beyond": result["peak"] - result["loaded"],
    }


def sweep(size: Size, count: int, tokenizer_name: str) -> dict[str, float]:
    """Seconds of evaluating one model at `count` α, everything included, and its memory beyond the loaded model."""
    return_freed_memory()
    logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    model = get_peft_model(size.build(), LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    sets = {name: load_rows(f"people/{name}").select(range(4)) for name in ("forget", "retain", "holdout")}
    protocol = custom_protocol(sets, chat=True, max_new_tokens=20)

    def work() -> list[float]:
        start = time.perf_counter()
        evaluator = Evaluator(model, tokenizer, protocol, progress=False)
        for number in range(count):
            evaluator.evaluate((number + 1) / count)
        return [time.perf_counter() - start]

    result = measure(model, work)
    return {"seconds": result["seconds"][0], "beyond": result["peak"] - result["loaded"]}


def print_row(name: str, values: list[float], seconds: list[float], memory: list[float]) -> None:
    """A row of the table, with fitted exponents."""
    cells = [
        name,
        ", ".join(f"{value / 1e6:.1f} M" if value > 1e6 else f"{value:,}" for value in values),
        ", ".join(f"{value:.2f}" for value in seconds),
        f"{exponent(values, seconds):.2f}",
        ", ".join(f"{value / 1e6:.0f}" for value in memory),
        f"{exponent(values, memory):.2f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


if __name__ == "__main__":
    main()
