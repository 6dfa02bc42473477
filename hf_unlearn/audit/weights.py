"""Weights that an attack changes for a while, and the weights of the model before forgetting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import SafetensorsCheckpoint, resolve_model
from hf_unlearn.extrapolation.checkpoint import find_tensor


Change = Callable[[str, torch.Tensor], torch.Tensor | None]


@contextmanager
def changed_weights(model: nn.Module, change: Change) -> Iterator[None]:
    """
    Run the model with other weights; those it had come back bit by bit at the end, also after an exception.

    Kept is a copy of the changed weights only, in the memory of the host.

    Args:
        model (`torch.nn.Module`): The model.
        change (`Callable`): Gets the name and the weight of each parameter, and returns the new one, of the same shape,
            or `None` to leave it.
    """
    kept: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                new = change(name, parameter.detach())
                if new is not None:
                    kept[name] = parameter.detach().to("cpu", copy=True)
                    parameter.copy_(new)
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                parameters[name].copy_(weight)


def linear_weights(model: PreTrainedModel) -> dict[str, bool]:
    """
    Names of the weights of the linear layers but the LM head, and whether their rows are inputs (`Conv1D`).

    Args:
        model (`PreTrainedModel`): A causal LM.
    """
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and module.weight is not embedding
    }


class BaseWeights:
    """
    The weights of the model before forgetting, read one tensor at a time.

    Args:
        base (`str`, `Path` or `PreTrainedModel`): Its folder or Hub id, or the model itself.
    """

    def __init__(self, base: str | Path | PreTrainedModel) -> None:
        self.label = str(base) if isinstance(base, (str, Path)) else base.name_or_path or type(base).__name__
        if isinstance(base, PreTrainedModel):
            self._tensors, self._checkpoint = dict(base.named_parameters()), None
        else:
            self._tensors, self._checkpoint = {}, SafetensorsCheckpoint(resolve_model(base))

    def read(self, name: str) -> torch.Tensor:
        """The base's weight of the live parameter `name`."""
        if self._checkpoint is None:
            return self._tensors[name].detach()
        return self._checkpoint.read(find_tensor(name, self._checkpoint))

    def obstacle(self, model: PreTrainedModel) -> str | None:
        """Why these weights do not fit into the model; `None` where they do."""
        for name, parameter in model.named_parameters():
            shape = self._shape(name)
            if shape is None:
                return f"the base has no tensor {name!r}, so it is not the model before forgetting"
            if shape != tuple(parameter.shape):
                return f"{name!r} has the shape {shape} in the base and {tuple(parameter.shape)} in the model"
        return None

    def at(self, t: float) -> Change:
        """The change to θ_base + t·(θ_base − θ_model), computed in fp32 at least; t = 0 is the base."""

        def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            base, own = self.read(name).to(weight.device, wide), weight.to(wide)
            return None if torch.equal(base, own) else base + t * (base - own)

        return change

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if self._checkpoint is None:
            return tuple(self._tensors[name].shape) if name in self._tensors else None
        found = find_tensor(name, self._checkpoint)
        return None if found is None else tuple(self._checkpoint.info(found).shape)


def check_plain(model: nn.Module) -> None:
    """Refuse a model whose weights cannot be changed and put back."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        raise UnlearningError(
            "The model carries an adapter, and the attacks change plain weights. Merge it first (`merge_and_unload`), or "
            "pass --adapter and --alpha on the command line."
        )
    if getattr(model, "is_quantized", False):
        raise UnlearningError(
            "The model is quantised, and the attacks change plain weights. Load it in 16 or 32 bits."
        )
