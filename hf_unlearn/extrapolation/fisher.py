"""How strongly rows pull at each module of an adapter: squared gradients of its factors, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data import drop_untrainable, encode_set, load_rows
from hf_unlearn.data.tokenization import IGNORED
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.live import adapter_scale
from hf_unlearn.lm_head import LMHead, forward_and_score
from hf_unlearn.losses import cross_entropy


def layer_fisher(
    model: PeftModel,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    name: str = "dataset",
    progress: bool = True,
) -> dict[str, float]:
    """
    The empirical Fisher information of each module of an adapter: the squared gradients of A and B of the mean answer
    loss of a row, summed over their entries, averaged over the rows. The average, and not the sum, makes sets of
    different sizes comparable.

    The gradient is taken at the trained adapter (its scale +1). At an untrained one, where B = 0, that of A vanishes,
    as it is proportional to B, and half of what is measured would be missing.

    Args:
        model (`PeftModel`): A causal LM with its trained adapter, live. It is left as it was.
        rows: Anything that [`~hf_unlearn.data.load_rows`] reads.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        max_length (`int`, *optional*, defaults to `1024`): Longest sequence.
        name (`str`, *optional*, defaults to `"dataset"`): How errors and the progress bar call the set.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar over the rows.

    Returns:
        `dict[str, float]`: name of each adapted module in the base model -> its value.
    """
    if not isinstance(model, PeftModel):
        raise UnlearningError("`model` must be a `peft.PeftModel` with a trained adapter. Load the adapter with PEFT.")
    encoded = drop_untrainable(encode_set(load_rows(rows, name=name), tokenizer, max_length, name=name))
    if not len(encoded):
        raise UnlearningError(
            f"The {name} has no row with an answer of which any token is within {max_length} tokens."
        )
    lm = model.get_base_model()
    factors = _factors(lm)
    parameters = [parameter for pair in factors.values() for parameter in pair]
    totals = dict.fromkeys(factors, 0.0)
    with _differentiable(model, parameters):
        for row in tqdm(encoded, desc=f"Fisher of the {name}", disable=not progress):
            loss = _answer_loss(lm, row["input_ids"], row["labels"])
            gradients = iter(torch.autograd.grad(loss, parameters))
            for module, pair in factors.items():
                totals[module] += sum(next(gradients).double().square().sum().item() for _ in pair)
    return {module: total / len(encoded) for module, total in totals.items()}


def _factors(lm: PreTrainedModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Name of each module of the active adapter -> A and B."""
    return {
        name: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
        for name, layer in lm.named_modules()
        if isinstance(layer, LoraLayer)
        for adapter in layer.active_adapters
        if adapter in layer.lora_A
    }


@contextmanager
def _differentiable(model: PeftModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The model in eval mode with its adapter at +1 and gradients for `parameters`; it is left as it was."""
    training = {module: module.training for module in model.modules()}
    required = [parameter.requires_grad for parameter in parameters]
    with adapter_scale(model, 1), torch.enable_grad():
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, flag in zip(parameters, required, strict=True):
                parameter.requires_grad_(flag)
            for module, flag in training.items():
                module.training = flag


def _answer_loss(lm: PreTrainedModel, input_ids: list[int], labels: list[int]) -> torch.Tensor:
    """Mean negative log-likelihood of the answer tokens of one row."""
    device = lm.get_input_embeddings().weight.device
    ids, targets = torch.tensor([input_ids], device=device), torch.tensor(labels[1:], device=device)
    scored = targets != IGNORED

    def score(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
        return cross_entropy(head.score(hidden[0, :-1][scored], targets[scored]).log_probs).mean()

    return forward_and_score(lm, score, input_ids=ids, attention_mask=torch.ones_like(ids))
