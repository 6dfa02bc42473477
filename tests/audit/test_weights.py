"""Weights that are changed for a while: what they become, by hand and in fp64, and that they come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import is_bitsandbytes_available

from hf_unlearn.audit.quantisation import _change, eight_bits, four_bits
from hf_unlearn.audit.weights import BaseWeights, changed_weights, check_plain, linear_weights
from hf_unlearn.errors import UnlearningError


NF4 = np.array(  # of the QLoRA paper, read by rows
    [
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
        [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
        [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
        [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    ]
).ravel()


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(model, before) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_eight_bits_by_hand():
    weight = torch.tensor([[1.27, -0.634, 0.004], [0.0, 0.0, 0.0], [-254.0, 3.0, 1.01]])
    expected = [[1.27, -0.63, 0.0], [0.0, 0.0, 0.0], [-254.0, 4.0, 2.0]]  # steps of .01, none, 2; 1.5 rounds to even
    torch.testing.assert_close(eight_bits(weight), torch.tensor(expected))


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
def test_four_bits_by_hand():
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 128)).astype(np.float32))
    blocks = weight.double().numpy().reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    nearest = NF4[np.abs((blocks / largest)[..., None] - NF4).argmin(-1)] * largest
    np.testing.assert_allclose(four_bits(weight).numpy(), nearest.reshape(6, 128), atol=1e-5)


def test_linear_layers_but_the_head():
    names = linear_weights(tiny_llama())
    assert len(names) == 2 * 7 and not any(names.values())
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert names.keys() == linear_weights(tiny_llama(tie_word_embeddings=False)).keys()


def test_layers_that_hold_inputs_in_rows():
    """GPT-2 stores (inputs, outputs): a scale belongs to an output there, too."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    names = linear_weights(model)
    assert len(names) == 4 and all(names.values())
    change = _change(names, eight_bits)
    weight = torch.tensor([[1.27, 127.0], [-0.634, 1.4]])
    torch.testing.assert_close(change(next(iter(names)), weight), torch.tensor([[1.27, 127.0], [-0.63, 1.0]]))
    assert change("transformer.wte.weight", weight) is None


def test_weights_come_back():
    model = tiny_llama()
    before = state(model)
    with changed_weights(model, lambda name, weight: weight * 3.1 if "q_proj" in name else None):
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert len(changed) == 2 and all("q_proj" in name for name in changed)
    assert_equal(model, before)
    with pytest.raises(RuntimeError, match="of the attack"), changed_weights(model, lambda name, weight: weight + 1):
        raise RuntimeError("of the attack")
    assert_equal(model, before)


def test_weights_come_back_where_the_change_fails_midway():
    model = tiny_llama()
    before = state(model)

    def change(name, weight):
        return weight[:1, :1].expand(3, 7) if "down_proj" in name else weight * 2

    with pytest.raises(RuntimeError), changed_weights(model, change):
        pass
    assert_equal(model, before)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_reverse_in_fp64(tmp_path, saved, t):
    base, model = tiny_llama(seed=1), tiny_llama(seed=2)
    if saved:
        base.save_pretrained(tmp_path)
    own, theirs = state(model), state(base)
    with changed_weights(model, BaseWeights(tmp_path if saved else base).at(t)):
        for name, tensor in model.state_dict().items():
            first, second = theirs[name].double().numpy(), own[name].double().numpy()
            np.testing.assert_allclose(tensor.numpy(), first + t * (first - second), atol=1e-6, rtol=0)
    assert_equal(model, own)


def test_the_memorising_model_lies_at_one_by_alpha():
    base, alpha = tiny_llama(seed=1), 0.8
    generator = torch.Generator().manual_seed(0)
    update = {
        name: 0.01 * torch.randn(p.shape, generator=generator)
        for name, p in base.named_parameters()
        if "q_proj" in name
    }
    model = tiny_llama(seed=1)
    with torch.no_grad():
        for name, delta in update.items():
            model.get_parameter(name).sub_(alpha * delta)
    with changed_weights(model, BaseWeights(base).at(1 / alpha)):
        for name, parameter in model.named_parameters():
            expected = base.get_parameter(name) + update.get(name, 0)
            torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=0)


def test_bases_that_do_not_fit(tmp_path):
    model = tiny_llama()
    assert BaseWeights(tiny_llama(seed=1)).obstacle(model) is None
    assert "(64, 64)" in BaseWeights(tiny_llama(intermediate_size=64)).obstacle(model)
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    assert "has no tensor 'model.layers.1" in BaseWeights(tmp_path).obstacle(model)


def test_refuses_an_adapter():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnlearningError, match="merge_and_unload.*--adapter"):
        check_plain(model)
