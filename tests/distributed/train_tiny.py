"""Trains the tiny model in as many processes as it is launched with: `train_tiny.py OUTPUT_DIR BATCH_SIZE`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn import EvaluationCallback, ExtrapolationConfig, ExtrapolationTrainer, custom_protocol


def main(output_dir: str, batch_size: str) -> None:
    trainer = ExtrapolationTrainer(
        model=tiny_llama(),
        args=ExtrapolationConfig(
            output_dir=output_dir,
            per_device_train_batch_size=int(batch_size),
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            learning_rate=1e-3,
            retain_kl_scale=-1.0,
            report_to="none",
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=3,
            use_cpu=True,
            disable_tqdm=True,
            ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        ),
        forget_dataset=tiny_rows(16, seed=1),
        retain_dataset=tiny_rows(7, seed=2),
        processing_class=tiny_tokenizer(),
    )
    sets = {"forget": tiny_rows(5, seed=1), "retain": tiny_rows(7, seed=2), "holdout": tiny_rows(3, seed=3)}
    sets = {name: Dataset.from_list(rows) for name, rows in sets.items()}
    protocol = custom_protocol(sets, chat=False, max_new_tokens=4)
    trainer.add_callback(EvaluationCallback(trainer, protocol, generate=True, batch_size=2))
    seen: list[list[int]] = []
    original = trainer.compute_loss

    def record(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"][~inputs["is_forget"]].tolist())
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    trainer.train()
    trainer.save_model()
    trainer.save_forget_adapter(Path(output_dir) / "forget-adapter", alpha=1.0)
    facts = {
        "processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "retain_rows": seen,
        "logs": [log for log in trainer.state.log_history if "retain_kl" in log],
        "evaluations": [log for log in trainer.state.log_history if "eval_trade_off" in log],
    }
    path = Path(output_dir) / f"facts-{trainer.accelerator.process_index}.json"
    path.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
