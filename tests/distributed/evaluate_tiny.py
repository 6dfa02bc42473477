"""Evaluates the tiny model in as many processes as it is launched with: `evaluate_tiny.py OUTPUT_DIR`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.data import load_rows
from hf_unlearn.evaluation import Evaluator, ResultCache, custom_protocol, score_answers
from hf_unlearn.evaluation.batching import BatchSize, process_state
from hf_unlearn.trainer.processes import leave_processes


def evaluate(output_dir: Path) -> dict[str, Any]:
    """What this process gets and how many tokens it computes: anew, from the cache, and in larger batches."""
    tokenizer = tiny_tokenizer()
    sets = {name: load_rows(tiny_rows(5, seed)) for seed, name in enumerate(("forget", "retain", "holdout"))}
    protocol = custom_protocol(sets, chat=False, max_new_tokens=4)
    torch.manual_seed(7)
    options = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), options)
    tokens = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: tokens.append(args[0].numel()))

    def run(batch_size: BatchSize, folder: str | None = None) -> list[dict[str, Any]]:
        cache = ResultCache(output_dir / (folder or f"cache-{batch_size}"))
        evaluator = Evaluator(model, tokenizer, protocol, batch_size=batch_size, cache=cache, progress=False)
        return [evaluation.to_dict() for evaluation in evaluator.run([1.5])]

    facts = {"evaluations": run(batch_size=1), "computed": sum(tokens)}
    tokens.clear()
    facts |= {"from_cache": run(batch_size=1), "computed_again": sum(tokens)}
    tokens.clear()
    rank = process_state().process_index
    own = output_dir / f"disk-of-{rank}"  # each process finds something else: all but three of its own results
    own.mkdir()
    lines = (output_dir / "cache-1" / f"process{rank}.jsonl").read_text().splitlines(keepends=True)
    (own / f"process{rank}.jsonl").write_text("".join(lines[3 * (rank + 1) :]))
    facts |= {"different_caches": run(batch_size=2, folder=own.name)}
    tokens.clear()
    facts |= {"automatic_batches": run(batch_size="auto"), "computed_automatic": sum(tokens)}
    return facts | {"no_rows": score_answers(model, [], tokenizer)}


if __name__ == "__main__":
    output = Path(sys.argv[1])
    result = evaluate(output)
    state = process_state()
    result |= {"processes": state.num_processes, "distributed_type": str(state.distributed_type)}
    (output / f"facts-{state.process_index}.json").write_text(json.dumps(result))
    leave_processes()
