"""Trains on a 4-bit base in as many processes as it is launched with: `train_quantised.py MODEL OUTPUT_DIR BATCH_SIZE`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tiny import tiny_rows
from transformers import BitsAndBytesConfig

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer
from hf_unlearn.trainer.processes import leave_processes


def main(model: str, output_dir: str, batch_size: str) -> None:
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if uses_deepspeed:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compilation
    trainer = ExtrapolationTrainer(
        model=model,
        args=ExtrapolationConfig(
            output_dir=output_dir,
            per_device_train_batch_size=int(batch_size),
            num_train_epochs=2,
            preset="paper",
            learning_rate=1e-3,
            warmup_steps=0,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not uses_deepspeed,
            bf16=False,
            dataloader_pin_memory=False,
            ddp_backend="gloo" if uses_deepspeed else None,
        ),
        forget_dataset=tiny_rows(8, seed=1),
        retain_dataset=tiny_rows(8, seed=2),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    trainer.train()
    facts = {
        "processes": trainer.accelerator.num_processes,
        "stage": trainer.model_wrapped.zero_optimization_stage() if uses_deepspeed else None,
        "shapes": sorted({tuple(parameter.shape) for parameter in trainer.model.parameters()}),
        "logs": [log for log in trainer.state.log_history if "retain_kl" in log],
    }
    trainer.save_model()
    if trainer.is_world_process_zero():
        (Path(output_dir) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_processes()
