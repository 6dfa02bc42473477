"""Fisher values of the modules of an adapter against gradients of the logits, row by row."""

from __future__ import annotations

import pytest
import torch
from extrapolation_models import add_adapter
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.data.tokenization import encode_pair
from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import adapter_scale, layer_fisher


MODULES = [
    f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


@pytest.fixture
def model():
    return add_adapter(tiny_llama(), r=2, lora_alpha=6)


def brute_force(model, rows, tokenizer, max_length=None) -> dict[str, float]:
    """Squared gradients by `backward` through whole logits, averaged over the rows."""
    totals = dict.fromkeys(MODULES, 0.0)
    for row in rows:
        model.zero_grad()
        pair = encode_pair(row["prompt"], row["completion"], tokenizer, max_length)
        logits = model(input_ids=torch.tensor([pair["input_ids"]])).logits[0]
        picked = [
            logits[t - 1].log_softmax(-1)[label] for t, label in enumerate(pair["labels"]) if t and label != -100
        ]
        (-torch.stack(picked).mean()).backward()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                module = name.removeprefix("base_model.model.").partition(".lora_")[0]
                totals[module] += parameter.grad.double().square().sum().item() / len(rows)
    return totals


def test_against_autograd(model):
    rows, tokenizer = tiny_rows(4, seed=3), tiny_tokenizer()
    wanted = brute_force(model, rows, tokenizer)
    assert len(wanted) == 6 and min(wanted.values()) > 0
    assert layer_fisher(model, rows, tokenizer, progress=False) == pytest.approx(wanted, rel=1e-4)


def test_the_model_is_left_as_it_was(model):
    rows, tokenizer = tiny_rows(2, seed=4), tiny_tokenizer()
    wanted = layer_fisher(model, rows, tokenizer, progress=False)
    model.train().requires_grad_(False)
    with adapter_scale(model, -3), torch.no_grad():
        assert layer_fisher(model, rows, tokenizer, progress=False) == wanted  # always at +1
        assert model.get_base_model().get_submodule(MODULES[0]).scaling["default"] == -3 * 3
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off(model):
    rows, tokenizer = tiny_rows(2, seed=4), tiny_tokenizer()
    wanted = layer_fisher(model, rows, tokenizer, progress=False)
    for layer in (model.get_base_model().get_submodule(name) for name in MODULES):
        layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert layer_fisher(model.train(), rows, tokenizer, progress=False) == wanted


def test_of_an_untrained_adapter_that_of_a_is_missing(model):
    """Why the trained adapter is used: at B = 0, halving A halves the gradient of B, and that of A is zero."""
    rows, tokenizer = tiny_rows(2, seed=5), tiny_tokenizer()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    before = layer_fisher(model, rows, tokenizer, progress=False)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.div_(2)
    after = layer_fisher(model, rows, tokenizer, progress=False)
    assert after == pytest.approx({module: value / 4 for module, value in before.items()}, rel=1e-5)


def test_long_rows_are_cut_and_rows_without_an_answer_are_refused(model):
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "w4 w5 w6", "completion": " w7 w8 w9"}]
    cut = layer_fisher(model, rows, tokenizer, max_length=4, progress=False)
    assert cut == pytest.approx(brute_force(model, rows, tokenizer, max_length=4), rel=1e-4)
    assert cut != pytest.approx(layer_fisher(model, rows, tokenizer, progress=False), rel=1e-2)
    with pytest.raises(UnlearningError, match="forget set has no row with an answer"):
        layer_fisher(model, rows, tokenizer, max_length=3, name="forget set", progress=False)


def test_a_model_without_adapter(model):
    with pytest.raises(UnlearningError, match="PeftModel"):
        layer_fisher(model.unload(), tiny_rows(1, seed=0), tiny_tokenizer(), progress=False)
