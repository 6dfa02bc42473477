"""
Compare the memory estimate of `hf-unlearn train --dry_run` with the peak memory of real steps on a CPU, in fp32.

    export OMP_NUM_THREADS=1
    python benchmarks/memory.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Each case trains in a fresh process: first a model of next to nothing, whose resident memory is that of Python and its
libraries, then `--steps` steps of the model on rows that fill their length and are scored at every position. The peak of
these steps (VmHWM of Linux, set back before them) less that floor is what the estimate has to meet. Weights count.

glibc keeps freed blocks for later, so a process holds more than its tensors. Each case is therefore measured twice: with
an allocator that hands freed blocks back (the estimate's own question), and with the default one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer
from hf_unlearn.trainer.memory import Launch, estimate_memory


CASES = [(2, 256, False), (2, 256, True), (4, 256, False), (4, 256, True)]  # rows of each set, tokens, checkpointing
HANDS_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or id of the model.")
    parser.add_argument(
        "--steps", type=int, default=2, help="Optimizer steps; the optimizer's state exists from the 2nd."
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)  # in the fresh processes
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.model, args.steps, *json.loads(args.case))))
        return
    print("| rows | tokens a row | checkpointing | estimated | measured | difference | measured, default allocator |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        rows, length, checkpointing = case
        command = [
            sys.executable,
            __file__,
            "--model",
            args.model,
            "--steps",
            str(args.steps),
            "--case",
            json.dumps(case),
        ]
        results = []
        for environment in (HANDS_BACK, {}):
            finished = subprocess.run(
                command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
            )
            results.append(json.loads(finished.stdout.splitlines()[-1]))
            print(results[-1], file=sys.stderr, flush=True)
        estimated = results[0]["estimated"]
        measured, by_default = (result["measured"] for result in results)
        print(
            f"| {rows} + {rows} | {length} | {'yes' if checkpointing else 'no'} | {estimated / 1e9:.2f} GB | "
            f"{measured / 1e9:.2f} GB | {100 * (estimated / measured - 1):+.0f} % | {by_default / 1e9:.2f} GB |",
            flush=True,
        )


def measure(model: str, steps: int, rows: int, length: int, checkpointing: bool) -> dict[str, float]:
    """Peak memory of training above that of the libraries, and its estimate, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tiny, tokenizer = Path(folder) / "tiny", word_tokenizer()
        options = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **options)).save_pretrained(tiny)
        train(str(tiny), tokenizer, Path(folder) / "first", 1, 1, 8, checkpointing)
        release()
        floor = status("VmRSS")

        trainer = trainer_of(
            model, AutoTokenizer.from_pretrained(model), Path(folder), steps, rows, length, checkpointing
        )
        release()
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        trainer.train()
        peak = status("VmHWM")
        estimate = estimate_memory(
            AutoConfig.from_pretrained(model),
            trainer.peft_model.peft_config["default"],
            forget_rows=rows,
            retain_rows=rows,
            length=length,
            gradient_checkpointing=checkpointing,
            launch=Launch(on_cpu=True),
        )
    terms = {name: getattr(estimate, name) for name in ("weights", "adapter", "activations", "workspace")}
    return {"floor": floor, "measured": peak - floor, "estimated": estimate.total, **terms}


def train(*arguments: object) -> None:
    trainer_of(*arguments).train()


def trainer_of(
    model: str, tokenizer: object, folder: Path, steps: int, rows: int, length: int, checkpointing: bool
) -> ExtrapolationTrainer:
    """A trainer whose every row fills `length` tokens."""
    config = ExtrapolationConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=rows,
        max_steps=steps,
        max_length=length,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    sets = [
        [{"text": f"{word} {number} " * length} for number in range(steps * rows)] for word in ("forget", "retain")
    ]
    return ExtrapolationTrainer(model, config, *sets, processing_class=tokenizer)


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "forget", "retain"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def release() -> None:
    """Hand freed memory back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
