"""
Time and weigh one training step, beside the steps of other trainers on the same rows.

    OMP_NUM_THREADS=2 python benchmarks/training_step.py --model SmolLM2-135M-Instruct --peer_source open-unlearning

Every variant is timed in a process of its own, one after the other, and weighed in another; the round is repeated. Seconds
are medians of all steps but the first of each process. `--peer_source` is a checkout of
https://github.com/locuslab/open-unlearning, whose `GradDiff` is run unchanged; without it gradient difference is restated
here. Prints Markdown tables:

- memory is the most that was resident, of the process and beyond its imports and the loaded model. The weighed processes
  let the allocator return what is freed at once; the timed ones do not, run faster, and hold 1 to 2 GB more;
- FLOP are those of the matrix products that the variant does: 2 per weight and token forward, as many backward (twice as
  many where the weight is trained), the forward again with gradient checkpointing, causal attention, and the LM head at
  each position and time that it is applied;
- the last column is the time that these take at the speed of a large matrix product on the same threads, the fastest that
  was measured, as a share of the time taken.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import io
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from training_step_peer import build_grad_diff
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer
from hf_unlearn.data.loading import load_rows
from hf_unlearn.data.tokenization import encode_set


VARIANTS = {
    "ours": "memorise + KL, LoRA",
    "ours_mirror": "the same, `retain_kl_scale=-1`",
    "ours_cached": "the same, `reference_cache=True`",
    "sft": "SFTTrainer, LoRA",
    "grad_diff": "GradDiff + KL, all weights",
}
OURS = {
    "ours": {"reference_cache": False},
    "ours_mirror": {"reference_cache": False, "retain_kl_scale": -1.0},
    "ours_cached": {"reference_cache": True},
}
HEAD_PASSES = {
    "forget": 2,
    "retain": 3,
}  # products with the LM head that ExtrapolationTrainer makes for a scored position
WEIGHED_STEPS = 2  # the second has the optimizer's moments
DEFAULT = ["ours", "ours_cached", "sft", "grad_diff"]
LORA_RANK = 16

Labels = list[list[int]]


@dataclass(frozen=True)
class Setting:
    """
    What a step works on.

    Args:
        pairs (`int`): Forget rows of a step, and as many retain rows.
        length (`int`): Tokens of each row, half of them scored; 0 takes the rows of the `people` sets as they are.
        checkpointing (`bool`): Gradient checkpointing.
    """

    pairs: int
    length: int
    checkpointing: bool

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read `4x256` or, with gradient checkpointing, `4x256c`."""
        pairs, length = text.removesuffix("c").split("x")
        return cls(int(pairs), int(length), text.endswith("c"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or id of the model.")
    parser.add_argument("--peer_source", type=Path, help="Checkout of open-unlearning.")
    parser.add_argument("--variants", nargs="+", default=DEFAULT, choices=list(VARIANTS), help="What to run.")
    parser.add_argument(
        "--settings",
        nargs="+",
        type=Setting.parse,
        default=[Setting.parse(text) for text in ("4x256", "4x256c")],
        help="Pairs x tokens of a row (0: the rows of the people sets), with a `c` for gradient checkpointing.",
    )
    parser.add_argument("--steps", type=int, default=3, help="Steps of each timed process, the first of which is not.")
    parser.add_argument("--repeats", type=int, default=1, help="Rounds through all variants.")
    args = parser.parse_args()

    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")  # Trainer does, and it is no memory of the step
    has_cache = "reference_cache" in {field.name for field in fields(ExtrapolationConfig)}
    variants = [name for name in args.variants if has_cache or name != "ours_cached"]
    for setting in args.settings:
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
        for _, variant in itertools.product(range(args.repeats), variants):
            given = variant, setting, args.model, args.peer_source
            weighed = apart(run, *given, WEIGHED_STEPS, True)
            timed = apart(run, *given, args.steps, False)
            runs[variant].append(weighed | {name: timed[name] for name in ("seconds", "matmul_speed")})
        print_table(setting, runs)


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, which begins with this one's imports."""
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.apply(function, args)


# ---- One variant, in its own process ----


def run(
    variant: str, setting: Setting, model_name: str, peer_source: Path | None, steps: int, weigh: bool
) -> dict[str, Any]:
    if weigh:
        return_freed_memory()
    logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    forget, retain = make_rows(tokenizer, setting)
    labels = forget["labels"][:], retain["labels"][:]
    with tempfile.TemporaryDirectory() as folder:

        def work() -> list[float]:
            parts = variant, setting, model, tokenizer, forget, retain, folder, steps, peer_source
            return time_steps(build_trainer(*parts))

        return {
            "matmul_speed": matmul_speed(),
            "tokens": sum(map(len, labels[0] + labels[1])),
            "flop": count_flop(model, variant, setting.checkpointing, *labels, peer_source is not None),
            **measure(model, work),
        }


def measure(model: PreTrainedModel, work: Callable[[], list[float]]) -> dict[str, Any]:
    """The seconds that `work` returns, and bytes of resident memory: with the model loaded, and at the peak."""
    sum(parameter.sum() for parameter in model.parameters())  # reads memory-mapped weights in
    loaded = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = work()
    return {"seconds": seconds, "loaded": loaded, "peak": memory("VmHWM")}


def time_steps(trainer: Trainer) -> list[float]:
    """Train, and return the seconds of each step but the first."""
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    return [after - before for before, after in itertools.pairwise(clock.ends)]


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def return_freed_memory() -> None:
    """Let glibc return freed blocks from 1 MiB at once, so that what is resident is in use. From the start, or not."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def memory(field: str) -> int:
    """A field of this process's memory status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def matmul_speed() -> float:
    """FLOP/s of a large fp32 matrix product, the best of five."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds[1:])


def make_rows(tokenizer, setting: Setting) -> tuple[Dataset, Dataset]:
    """The forget rows and the retain rows of a step: every step has the same ones."""
    sets = [encode_set(load_rows(f"people/{name}"), tokenizer, 1024, name=name) for name in ("forget", "retain")]
    if not setting.length:
        return tuple(rows.select(range(setting.pairs)) for rows in sets)
    return tuple(rows_of_length(rows["input_ids"][:], setting.pairs, setting.length) for rows in sets)


def rows_of_length(texts: list[list[int]], count: int, length: int) -> Dataset:
    """Tokenised rows, the second half of each scored, cut from one text after the other."""
    stream = itertools.cycle(itertools.chain.from_iterable(texts))
    rows = [list(itertools.islice(stream, length)) for _ in range(count)]
    half = length // 2
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "labels": [[-100] * half + row[half:] for row in rows],
            "prompt": [str(row[:half]) for row in rows],
            "completion": [str(row[half:]) for row in rows],
            "row": list(range(count)),
            "num_cut": [0] * count,
        }
    )


def build_trainer(
    variant: str,
    setting: Setting,
    model: PreTrainedModel,
    tokenizer,
    forget: Dataset,
    retain: Dataset,
    folder: str,
    steps: int,
    peer_source: Path | None = None,
) -> Trainer:
    """The trainer of a variant. Where it is not told otherwise it keeps its own defaults."""
    options = {
        "output_dir": folder,
        "max_steps": steps,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": setting.checkpointing,
    }
    lora = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    if variant in OURS:
        known = {field.name for field in fields(ExtrapolationConfig)}
        own = {name: value for name, value in OURS[variant].items() if name in known}
        config = ExtrapolationConfig(per_device_train_batch_size=setting.pairs, **own, **options)
        return ExtrapolationTrainer(model, config, forget, retain, processing_class=tokenizer, peft_config=lora)
    if variant == "sft":
        rows = Dataset.from_dict({name: forget[name][:] + retain[name][:] for name in ("input_ids", "labels")})
        config = SFTConfig(per_device_train_batch_size=2 * setting.pairs, **options)
        return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    config = TrainingArguments(per_device_train_batch_size=setting.pairs, remove_unused_columns=False, **options)
    return build_grad_diff(model, config, forget, retain, tokenizer.pad_token_id, peer_source)


# ---- FLOP ----


def count_flop(
    model: PreTrainedModel, variant: str, checkpointing: bool, forget: Labels, retain: Labels, is_peer: bool = False
) -> float:
    """
    FLOP of the matrix products of a step as it is done, padding included.

    Args:
        model (`PreTrainedModel`): The model without adapter.
        variant (`str`): One of `VARIANTS`.
        checkpointing (`bool`): Gradient checkpointing.
        forget (`list` of `list` of `int`): Labels of the forget rows.
        retain (`list` of `list` of `int`): Labels of the retain rows.
        is_peer (`bool`, *optional*, defaults to `False`): Whether gradient difference is that of open-unlearning.
    """
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    body = sum(module.weight.numel() for module in linear)
    adapter = sum(LORA_RANK * sum(module.weight.shape) for module in linear)
    attention = model.config.hidden_size * model.config.num_hidden_layers  # × 2 × length: causal, of both products

    def in_body(rows: Labels, forwards: int, weights: int, adapters: int) -> float:
        """`forwards` passes through attention; products with each weight, and with each adapter weight."""
        length = max(map(len, rows))
        return len(rows) * length * 2 * (weights * body + adapters * adapter + forwards * attention * length)

    def in_head(positions: int, passes: int) -> float:
        return positions * passes * 2 * head.weight.numel()

    again = int(checkpointing)
    if variant == "grad_diff":
        padded = [len(rows) * max(map(len, rows)) for rows in (forget, retain)]
        # Forward, backward for activations and for weights; for the retain rows also the reference, and in
        # open-unlearning one more forward whose result is not used.
        extra = 2 if is_peer else 1
        return (
            in_body(forget, 3 + again, 3 + again, 0)
            + in_body(retain, 3 + again + extra, 3 + again + extra, 0)
            + in_head(padded[0], 3)
            + in_head(padded[1], 3 + extra)
        )
    # Forward and backward for activations; the adapter's weights have a gradient too.
    total = in_body(forget + retain, 3 + again, 2 + again, 3 + again)
    if variant == "sft":  # on CPU, TRL projects all positions: forward, forward again, backward
        rows = forget + retain
        return total + in_head(len(rows) * (max(map(len, rows)) - 1), 3)
    if variant != "ours_cached":
        total += in_body(retain, 1, 1, 0)
    for name, rows in (("forget", forget), ("retain", retain)):
        total += in_head(sum(label != -100 for row in rows for label in row[1:]), HEAD_PASSES[name])
    return total


# ---- The table ----


def print_table(setting: Setting, runs: dict[str, list[dict[str, Any]]]) -> None:
    """A Markdown table of all variants in one setting."""
    tokens = next(iter(runs.values()))[0]["tokens"]
    speeds = [run["matmul_speed"] / 1e9 for of_variant in runs.values() for run in of_variant]
    rows = f"of {setting.length} tokens, half of them scored" if setting.length else "of the people sets"
    print(
        f"{setting.pairs} forget and {setting.pairs} retain rows {rows}: {tokens} tokens. "
        f"{'With' if setting.checkpointing else 'Without'} gradient checkpointing. {torch.get_num_threads()} threads, "
        f"{min(speeds):.0f} to {max(speeds):.0f} GFLOP/s, load {os.getloadavg()[0]:.1f}.\n\n"
        "| trainer | s a step (least, most) | × SFT | × GradDiff | tokens/s | memory, GB | beyond the model, GB "
        "| × GradDiff | TFLOP | of the speed |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    medians = {variant: summary(of_variant) for variant, of_variant in runs.items()}

    def ratio(value: str, of: dict[str, float], other: str) -> str:
        return f"{of[value] / medians[other][value]:.2f}" if other in medians else "–"

    for variant, of in medians.items():
        cells = [
            VARIANTS[variant],
            f"{of['seconds']:.2f} ({of['least']:.2f}, {of['most']:.2f})",
            ratio("seconds", of, "sft"),
            ratio("seconds", of, "grad_diff"),
            f"{tokens / of['seconds']:.0f}",
            f"{of['peak'] / 1e9:.2f}",
            f"{of['beyond'] / 1e9:.2f}",
            ratio("beyond", of, "grad_diff"),
            f"{of['flop'] / 1e12:.2f}",
            f"{of['flop'] / of['seconds'] / max(speeds) / 1e9:.0%}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print()


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the steps and the processes of a variant."""
    seconds = [second for run in runs for second in run["seconds"]]
    return {
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "peak": statistics.median(run["peak"] for run in runs),
        "beyond": statistics.median(run["peak"] - run["loaded"] for run in runs),
        "flop": runs[0]["flop"],
    }


if __name__ == "__main__":
    main()
