"""
Trains the tiny model on sharded weights, with evaluations in between and after: `sharded_evaluation.py zero3|fsdp2 MODEL
OUTPUT_DIR`. What each process saw is written for the tests to compare with one process.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import VOCABULARY as WORDS
from tiny import tiny_rows, tiny_tokenizer
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_unlearn import EvaluationCallback, Evaluator, ExtrapolationConfig, ExtrapolationTrainer, custom_protocol
from hf_unlearn.evaluation import generate_answers
from hf_unlearn.trainer.processes import leave_processes


SIZES = {"forget": 5, "retain": 7, "holdout": 3}
MAX_NEW_TOKENS = 6
VOCABULARY = 768  # so that the LM head is larger than a layer with its adapter
BATCH_SIZES = (2, "auto")
ALPHAS = (0.0, 1.0)


def tokenizer():
    """The tiny tokenizer with a word for each token of the vocabulary."""
    larger = tiny_tokenizer()
    larger.add_tokens([f"w{index}" for index in range(WORDS, VOCABULARY)])
    return larger


def protocol():
    sets = {name: Dataset.from_list(tiny_rows(size, seed)) for seed, (name, size) in enumerate(SIZES.items(), 1)}
    return custom_protocol(sets, chat=False, max_new_tokens=MAX_NEW_TOKENS)


class Passes:
    """Counts the tokens that a process computes and its passes, those without work apart."""

    def __init__(self, model) -> None:
        self.clear()
        model.get_input_embeddings().register_forward_hook(self._count)

    def clear(self) -> None:
        self.tokens, self.passes, self.idle = 0, 0, 0

    def _count(self, module, args, output) -> None:
        tokens = int((args[0] != 0).sum())  # 0 is padding, and all there is in a pass without work
        self.tokens += tokens
        self.passes += 1
        self.idle += tokens == 0

    def to_dict(self) -> dict[str, int]:
        return {"tokens": self.tokens, "passes": self.passes, "idle": self.idle}


class LargestGather(TorchDispatchMode):
    """Sees every collective operation; keeps the size of the largest weights that one of them gathered."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "gather" in func.name():
            outputs = [tensor for tensor in torch.utils._pytree.tree_leaves(args[0]) if tensor.is_floating_point()]
            self.numel = max(self.numel, sum(tensor.numel() for tensor in outputs))
        return func(*args, **(kwargs or {}))


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel() < parameter.numel()
    return parameter.shape == (0,)


def use(sharding: str) -> None:
    """What each way of sharding needs to run on a CPU."""
    if sharding == "zero3":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the start, over a minute
    else:
        from accelerate import DistributedType, PartialState

        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


class SaveAdapters(TrainerCallback):
    """Saves the adapter of every evaluation."""

    def __init__(self, trainer: ExtrapolationTrainer) -> None:
        self.trainer = trainer

    def on_evaluate(self, args, state, control, **kwargs):
        self.trainer.save_model(f"{args.output_dir}/adapter-{state.global_step}")


@contextmanager
def planted_error(rank: int):
    """What process 0 gets when process 1 fails between two passes."""
    messages: list[str] = []

    def fail(indices: list[int], answers: list[str]) -> None:
        if rank == 1:
            raise ValueError("the disk is full")

    try:
        yield fail, messages
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")


def main(sharding: str, model: str, output_dir: str) -> None:
    faulthandler.dump_traceback_later(280, exit=True)  # processes that wait for each other end, and say where
    use(sharding)
    trainer = ExtrapolationTrainer(
        model=model,
        args=ExtrapolationConfig(
            output_dir=output_dir,
            per_device_train_batch_size=2,
            max_steps=2,
            learning_rate=3e-2,
            report_to="none",
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=1,
            ddp_backend="gloo",
            bf16=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        forget_dataset=tiny_rows(8, seed=1),
        retain_dataset=tiny_rows(8, seed=2),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )  # DeepSpeed's hooks are what a pass takes: as few modules as have all kinds of them
    rank = trainer.accelerator.process_index
    trainer.add_callback(EvaluationCallback(trainer, protocol(), generate=True, batch_size=2))
    trainer.add_callback(SaveAdapters(trainer))
    trainer.train()
    weights = trainer.peft_model.named_parameters
    facts: dict[str, Any] = {
        "processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "logs": [log for log in trainer.state.log_history if "eval_trade_off" in log],
        "unsharded_before": [name for name, weight in weights() if not is_sharded(weight)],
        "parameters": sum(getattr(weight, "ds_numel", weight.numel()) for _, weight in weights()),
    }
    passes = Passes(trainer.peft_model)
    with planted_error(rank) as (fail, messages):
        prompts = [row["prompt"] for row in tiny_rows(5, seed=1)]
        generate_answers(trainer.peft_model, prompts, tokenizer(), batch_size=1, on_results=fail)
    facts["planted_error"] = messages
    with LargestGather() as largest:
        for batch_size in BATCH_SIZES:
            passes.clear()
            evaluator = Evaluator(
                trainer.peft_model, trainer.processing_class, protocol(), batch_size=batch_size, progress=False
            )
            facts[f"evaluations_{batch_size}"] = [evaluator.evaluate(alpha).to_dict() for alpha in ALPHAS]
            facts[f"passes_{batch_size}"] = passes.to_dict()
    facts["largest_gather"] = largest.numel
    facts["unsharded_after"] = [name for name, weight in weights() if not is_sharded(weight)]
    trainer.save_model()
    (Path(output_dir) / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_processes()
