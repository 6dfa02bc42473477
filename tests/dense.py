"""The tiny model in fp64 with plain logits, one row at a time: what the trainers' gradients are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_llama
from torch.func import functional_call
from transformers import TrainerCallback


class GradientRecorder(TrainerCallback):
    """Keeps the gradients and the trained weights right before each optimiser step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        self.weights.append({name: p.detach().clone() for name, p in parameters.items()})


def one_epoch(tmp_path: Path, batch_size: int, accumulation: int) -> dict[str, Any]:
    """Options of a run whose every step can be recomputed."""
    return {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "warmup_steps": 0,  # the first step of a warm-up changes nothing
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def randomise_lora_b(trainer) -> None:
    """Take the adapter away from its start, where B = 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


class DenseModel:
    """
    The tiny model with trained weights as fp64 leaves.

    Args:
        trained (`dict`): The factors of an adapter (merged at `lora_alpha` 32, rank 16), or weights of the model.
    """

    def __init__(self, trained: dict[str, torch.Tensor]) -> None:
        self.model = tiny_llama().double()
        self.leaves = {name: value.double().requires_grad_() for name, value in trained.items()}

    def weights(self, live: bool) -> dict[str, torch.Tensor]:
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        for name in self.leaves if live else ():
            if "lora_A" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
                product = self.leaves[name.replace("lora_A", "lora_B")] @ self.leaves[name]
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + (32 / 16) * product
            elif "lora_B" not in name:
                weights[name] = self.leaves[name]
        return weights

    def run(self, row: dict[str, list[int]], live: bool = True, layer: int | None = None):
        """Logits (or the outputs of a layer) at the positions that predict the answer of a row, and its tokens."""
        labels = torch.tensor(row["labels"][1:])
        at = labels != -100
        arguments = (torch.tensor([row["input_ids"]]),)
        outputs = []
        hooks = [
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for module in self.model.model.layers
        ]
        logits = functional_call(self.model, self.weights(live), arguments).logits
        for hook in hooks:
            hook.remove()
        values = logits if layer is None else outputs[layer]
        return (values if live else values.detach())[0, :-1][at], labels[at]


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Relative to the largest gradient entry, 1e-5."""
    size = max(value.abs().max() for value in expected.values())
    assert size > 1e-4
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].double() - value).abs().max() <= 1e-5 * size, name
