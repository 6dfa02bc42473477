"""Scaling the live adapter and merging it into a state dict."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import peft
import pytest
import torch
from extrapolation_models import GPT2_TARGETS, add_adapter, build_gpt2, build_llama, save_pair
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import (
    LoraAdapter,
    adapter_scale,
    extrapolate,
    extrapolated,
    merged_state_dict,
    save_live_forget_model,
)
from hf_unlearn.extrapolation.live import check_tokens_in_order


def scalings(model) -> set[float]:
    return {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}


def expected_state_dict(model, base, alpha: float, scaling: float, transposed: bool = False):
    """theta_for in fp64 from the live factors and an untouched copy of the base."""
    wanted = {name: tensor.double() for name, tensor in base.state_dict().items()}
    parameters = dict(model.named_parameters())
    for name, a in parameters.items():
        if "lora_A" in name:
            b = parameters[name.replace("lora_A", "lora_B")].double()
            update = scaling * b @ a.double()
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            wanted[f"{module}.weight"] -= alpha * (update.T if transposed else update).detach()
    return wanted


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_is_absolute_nested_and_restored(rslora):
    model = add_adapter(build_llama(), use_rslora=rslora)
    trained = 8 / (math.sqrt(4) if rslora else 4)
    assert scalings(model) == {trained}
    with adapter_scale(model, -2):
        assert scalings(model) == {-2 * trained}
        with adapter_scale(model, 0.5):
            assert scalings(model) == {0.5 * trained}
        assert scalings(model) == {-2 * trained}
        with pytest.raises(RuntimeError), adapter_scale(model, 3):
            raise RuntimeError
        assert scalings(model) == {-2 * trained}
    assert scalings(model) == {trained}


def test_scale_leaves_inactive_adapters_alone():
    model = add_adapter(build_llama())
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    with adapter_scale(model, -1):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling == {"default": -2, "other": 1}


def test_scale_one_zero_and_minus_alpha(tokens):
    model, base = add_adapter(build_llama()), build_llama()
    with torch.no_grad():
        trained = model(tokens).logits
        with adapter_scale(model, 1):
            assert torch.equal(model(tokens).logits, trained)
        with adapter_scale(model, 0):
            torch.testing.assert_close(model(tokens).logits, base(tokens).logits, atol=1e-6, rtol=0)
        wanted = expected_state_dict(model, base, 2.5, 2.0)
        base.load_state_dict({name: tensor.float() for name, tensor in wanted.items()})
        with extrapolated(model, 2.5):
            torch.testing.assert_close(model(tokens).logits, base(tokens).logits, atol=1e-5, rtol=0)


def test_extrapolated_restores_training_flags():
    model = add_adapter(build_llama(), lora_dropout=0.5).train()
    model.get_base_model().model.norm.eval()
    flags = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), extrapolated(model, 1):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == flags
    with extrapolated(model, 0):
        assert scalings(model) == {0}


def test_bad_live_input(tokens):
    with pytest.raises(UnlearningError, match="no LoRA layer"), adapter_scale(build_llama(), 1):
        pass
    model = add_adapter(build_llama())
    with pytest.raises(UnlearningError, match="finite"), adapter_scale(model, float("nan")):
        pass
    with pytest.raises(UnlearningError, match="memorise more"), extrapolated(model, -1):
        pass
    model.merge_adapter()
    with pytest.raises(UnlearningError, match="merged"), adapter_scale(model, 1):
        pass
    with pytest.raises(UnlearningError, match="merged"):
        merged_state_dict(model, 1)
    with pytest.raises(UnlearningError, match="PeftModel"):
        merged_state_dict(build_llama(), 1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("build", [build_llama, build_gpt2])
def test_merged_state_dict(build, dtype):
    gpt2 = build is build_gpt2
    model = add_adapter(build(), **({"target_modules": GPT2_TARGETS, "fan_in_fan_out": True} if gpt2 else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapter_scale(model, 7):  # the trained scale counts, not the present one
        merged, errors = merged_state_dict(model, 1.7, dtype)
    wanted = expected_state_dict(model, build(), 1.7, 2.0, transposed=gpt2)
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == (dtype or torch.float32)
        tolerance = {"rtol": 0, "atol": 1e-6} if dtype is None else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(tensor.double(), wanted[name], **tolerance, msg=name)
    assert errors.relative < (1e-4 if dtype is None else 0.1)
    assert errors.changed_tensors == (8 if gpt2 else 6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if gpt2:
        assert merged["lm_head.weight"].data_ptr() == merged["transformer.wte.weight"].data_ptr()


def test_live_and_file_merge_agree_to_the_bit(tmp_path):
    base, adapter, wrapped = save_pair(build_llama(dtype=torch.bfloat16), tmp_path)
    extrapolate(base, adapter, 1.7, tmp_path / "out", progress=False)
    merged, errors = merged_state_dict(wrapped, 1.7)
    files = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == files.keys()
    assert all(torch.equal(tensor, files[name]) for name, tensor in merged.items())
    assert 0 < errors.relative < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "use_dora"), ({"target_modules": ["q_proj", "embed_tokens"]}, "Embedding")],
)
def test_merged_state_dict_refuses_what_it_cannot_merge(options, message):
    with pytest.raises(UnlearningError, match=message):
        merged_state_dict(add_adapter(build_llama(), **options), 1)


def test_merged_state_dict_of_a_quantised_base():
    model = build_llama()
    model.is_quantized = True
    with pytest.raises(UnlearningError, match="quantised"):
        merged_state_dict(add_adapter(model), 1)


def test_merged_state_dict_of_sharded_weights():
    model = add_adapter(build_llama())
    model.get_base_model().model.norm.weight.ds_id = 0  # as ZeRO-3 marks what it shards
    with pytest.raises(UnlearningError, match=r"sharded over the processes.*save_forget_model"):
        merged_state_dict(model, 1)


def test_merged_state_dict_without_effect():
    with pytest.raises(UnlearningError, match="Not one weight changed"):
        merged_state_dict(add_adapter(build_llama(), std=0.0), 1)


SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
MODELS = {
    "llama": build_llama,
    "tokens of all rows in one line": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64)),
    "a shared expert": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **EXPERTS, num_key_value_heads=2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_scale_of_its_own_per_row(tokens, name):
    torch.manual_seed(0)
    model = add_adapter(MODELS[name](), target_modules="all-linear")
    scales = torch.tensor([[1.0], [-2.0]]).expand(tokens.shape)
    with torch.no_grad():
        with adapter_scale(model, scales):
            together = model(tokens).logits
            with adapter_scale(model, 3):  # the inner context counts
                inner = model(tokens).logits
            torch.testing.assert_close(model(tokens).logits, together)
            with model.disable_adapter():  # the reference may be asked about some of the rows
                reference = model(tokens[:1]).logits
        for scale, logits, rows in ((0, reference, tokens[:1]), (3, inner, tokens)):
            with adapter_scale(model, scale):
                torch.testing.assert_close(logits, model(rows).logits)
        for row, scale in enumerate((1.0, -2.0)):
            with adapter_scale(model, scale):
                torch.testing.assert_close(together[row], model(tokens).logits[row], atol=1e-5, rtol=0)
    assert scalings(model) == {2}
    with pytest.raises(UnlearningError, match="finite"), adapter_scale(model, torch.tensor([[1.0, float("inf")]])):
        pass


def test_tokens_that_nobody_can_tell_apart_are_refused(tokens):
    scales = torch.ones(2, tokens.shape[1])
    model = add_adapter(build_llama())
    told = pytest.raises(UnlearningError, match=r"gets \(1, .*not known which.*Leave the module out")
    with told, adapter_scale(model, scales), torch.no_grad():
        model(tokens[:1])
    expert = torch.nn.ModuleDict(
        {"experts": torch.nn.ModuleList([torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)})])}
    )
    check_tokens_in_order(torch.nn.ModuleDict({"mlp": expert, "attention": torch.nn.Linear(4, 4)}))  # no adapter
    routed = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), torch.nn.ModuleDict({"mlp": expert}))
    with pytest.raises(UnlearningError, match=r"'mlp.experts.0.up'.*router.*Leave the experts out.*retain_kl_scale"):
        check_tokens_in_order(routed)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_live_model_equals_the_file_merge(tmp_path, tokens, tied, dtype):
    base, folder, wrapped = save_pair(build_llama(tied=tied), tmp_path)
    tokenizer = SimpleNamespace(save_pretrained=lambda path: (path / "tokenizer.json").write_text("{}"))
    options = {"tokenizer": tokenizer, "adapter": LoraAdapter.load(folder), "dtype": dtype}
    save_live_forget_model(wrapped, 1.7, tmp_path / "live", **options)
    extrapolate(base, folder, 1.7, tmp_path / "files", dtype=dtype, progress=False)
    live, files = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "files"))
    assert live.keys() == files.keys() and all(torch.equal(live[name], files[name]) for name in files)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("live", "files")]
    assert models[0].dtype == models[1].dtype == (torch.bfloat16 if dtype else torch.float32)
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)
    records = [json.loads((tmp_path / name / "unlearning.json").read_text()) for name in ("live", "files")]
    assert records[0].keys() == records[1].keys()
    assert all(records[0][key] == records[1][key] for key in ("kind", "alpha", "dtype", "adapter", "data", "versions"))
    assert records[0]["base"]["fingerprint"] == records[1]["base"]["fingerprint"]
    assert (tmp_path / "live" / "tokenizer.json").exists()
    with pytest.raises(UnlearningError, match="not empty"):
        save_live_forget_model(wrapped, 1.7, tmp_path / "live", **options)
    with pytest.raises(UnlearningError, match="`dtype="):
        save_live_forget_model(wrapped, 1.7, tmp_path / "other", **{**options, "dtype": "int8"})
