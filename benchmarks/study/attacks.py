"""
What is left for someone who tries: relearning, coarser weights, and walking back.

    python benchmarks/study/attacks.py --tofu TOFU --work WORK --methods rounds-held-nll mox npo wga

Takes the methods that `run.py` has measured at their best point (the best forget quality at 98 % of the target's utility)
and writes one file a method and seed to results/<setting>/attacks. The retrained model goes through the same, as the
measure of what is possible.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import datasets
import torch
from best import best
from measure import Target, point, train, write
from methods import METHODS, Method
from peft import LoraConfig
from run import RESULTS
from setting import SETTINGS, Prepared, prepare
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_unlearn.data import to_prompt_completion
from hf_unlearn.extrapolation import LoraAdapter


RELEARN_STEPS = (0, 1, 2, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--base_model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--methods", nargs="+", choices=METHODS, required=True, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    prepared = prepare(args.setting, args.tofu, args.work, args.base_model)
    target = Target(prepared)
    folder = args.results / args.setting
    retrained = folder / "attacks" / "retrained.json"
    if not retrained.exists():
        model = AutoModelForCausalLM.from_pretrained(prepared.retrained, dtype=torch.float32)
        write(retrained, attack(prepared, model, None))
    of_retrained = point(prepared.log, 0.0)
    for seed in args.seeds:
        for name in args.methods:
            path = folder / "attacks" / f"{name}-{seed}.json"
            if path.exists():
                continue
            result = json.loads((folder / f"{name}-{seed}.json").read_text())
            at = best(result["points"], target.figures, of_retrained)
            if at is target.figures:
                print(f"{name} {seed}: nothing better than the target within the budget")
                continue
            model, mirrored = models_at(prepared, result, at["strength"], args.work / args.setting / "runs")
            write(path, {"method": name, "seed": seed, "at": at} | attack(prepared, model, mirrored))
            print(f"{name} {seed}: done", flush=True)


def models_at(
    prepared: Prepared, result: dict[str, Any], strength: float, work: Path
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The unlearned model, and the target walked as far the other way: θ_ref + (θ_ref − θ_for)."""
    method, seed = METHODS[result["method"]], result["seed"]
    if method.kind == "baseline":
        adapter = trained_again(prepared, method, result, int(strength), work)
        return moved(prepared, adapter, 1.0), moved(prepared, adapter, -1.0)
    adapter = LoraAdapter.load(work / f"{method.name}-{seed}")
    return moved(prepared, adapter, -strength), moved(prepared, adapter, strength)


def trained_again(prepared: Prepared, method: Method, result: dict[str, Any], steps: int, work: Path) -> LoraAdapter:
    """The adapter of a baseline after `steps` steps, which is trained with the same seed."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= steps

    folder = work / f"{method.name}-{result['seed']}-at-{steps}"
    if not (folder / "unlearning.json").exists():
        train(prepared, method, result["seed"], folder, callback=lambda _: Stop())
    return LoraAdapter.load(folder)


@torch.no_grad()
def moved(prepared: Prepared, adapter: LoraAdapter, scale: float) -> PreTrainedModel:
    """The target plus `scale` times the update of an adapter."""
    model = prepared.load_target()
    for module in adapter.modules:
        model.get_submodule(module).weight.add_(adapter.delta(module), alpha=scale)
    return model


def attack(prepared: Prepared, model: PreTrainedModel, mirrored: PreTrainedModel | None) -> dict[str, Any]:
    """Figures of a model as it is, in fewer bits, walked back (the retrained model has no way back), and relearned."""

    def figures(of: PreTrainedModel) -> dict[str, Any]:
        log = None if mirrored is None else prepared.log  # nothing is compared with itself
        return point(prepared.evaluator(of, retrained=log).evaluate(), 0.0)

    found: dict[str, Any] = {"as it is": figures(model)}
    for bits, rounded in {"8 bits": eight_bits, "4 bits": four_bits}.items():
        found[bits] = figures(with_weights(prepared, model, rounded))
    if mirrored is not None:
        found["walked back"] = figures(mirrored)
    found["relearned"] = relearn(prepared, model)
    return found


def eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """LLM.int8's weights: 127 steps of the largest value of each row."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    """NF4 in blocks of 64, as QLoRA."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight.contiguous(), quant_type="nf4"))


@torch.no_grad()
def with_weights(
    prepared: Prepared, model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]
) -> PreTrainedModel:
    """A copy of the model whose linear layers but the LM head are changed."""
    copy = prepared.load_target()
    copy.load_state_dict(model.state_dict())
    for module in copy.modules():
        if isinstance(module, nn.Linear) and module is not copy.get_output_embeddings():
            module.weight.copy_(change(module.weight))
    return copy


def relearn(prepared: Prepared, model: PreTrainedModel) -> list[dict[str, Any]]:
    """Fine-tune on a quarter of the forget rows, and see what comes back of the others: their mean answer probability."""
    rows = prepared.rows.forget
    quarter = rows[: len(rows) // 4]
    copy = prepared.load_target()
    copy.load_state_dict(model.state_dict())
    chat = prepared.tokenizer.chat_template is not None
    content = to_prompt_completion(datasets.Dataset.from_list(quarter), name="relearned rows", chat=chat)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    found: list[dict[str, Any]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in RELEARN_STEPS:
                found.append(others(state.global_step))

    def others(step: int) -> dict[str, Any]:
        training = trainer.model.training
        trainer.model.eval()
        columns = prepared.evaluator(trainer.model, retrained=None).evaluate(generate=False).rows["forget"]
        trainer.model.train(training)
        values = columns["probability"][len(quarter) :]
        return {"step": step, "probability": sum(values) / len(values)}

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=RELEARN_STEPS[-1],
            learning_rate=prepared.setting.learning_rate,
            per_device_train_batch_size=len(quarter),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(),
            seed=0,
        )
        trainer = SFTTrainer(
            copy,
            args,
            train_dataset=content.select_columns(["prompt", "completion"]),
            processing_class=prepared.tokenizer,
            peft_config=lora,
            callbacks=[Watch()],
        )
        found.append(others(0))
        trainer.train()
    return found


if __name__ == "__main__":
    main()
