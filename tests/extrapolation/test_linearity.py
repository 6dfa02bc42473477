"""Every option of `LoraConfig` that is not linear in alpha is refused by name; every one that is passes."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from extrapolation_models import GPT2_TARGETS, add_adapter, build_gpt2, build_llama
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    EvaConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import check_lora_config, check_target_modules
from hf_unlearn.extrapolation.linearity import LINEAR_VARIANTS, REFUSED_OPTIONS


REFUSED = {
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "lora_bias": True,
    "layer_replication": [(0, 2), (0, 2)],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"]),
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "megatron_config": {"tensor_model_parallel_size": 2},
    "lora_alpha": -8,
}


@pytest.mark.parametrize("option", REFUSED)
def test_refused_options(option):
    config = peft.LoraConfig()
    setattr(config, option, REFUSED[option])
    with pytest.raises(UnlearningError, match=f"`{option}"):
        check_lora_config(config)


def test_every_variant_of_peft_is_decided():
    variants = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants <= REFUSED_OPTIONS.keys() | LINEAR_VARIANTS


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"])
def test_initialisations_that_rewrite_the_base(init):
    config = peft.LoraConfig()
    config.init_lora_weights = init
    with pytest.raises(UnlearningError, match="`init_lora_weights="):
        check_lora_config(config)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "eva"])
def test_accepted_initialisations_leave_the_base_alone(init):
    config = {"init_lora_weights": init, **({"eva_config": EvaConfig()} if init == "eva" else {})}
    check_lora_config(peft.LoraConfig(**config))
    model = build_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = add_adapter(model, **config).get_base_model().state_dict()
    for name, tensor in before.items():
        key = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[key], tensor), name


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"lora_dropout": 0.1},
        {"fan_in_fan_out": True},
        {"velora_config": VeloraConfig()},
        {"layers_to_transform": [0], "target_modules": ["q_proj"]},
    ],
)
def test_linear_options_pass(options):
    check_lora_config(peft.LoraConfig(**options))


@pytest.mark.parametrize("config", [peft.AdaLoraConfig(total_step=10), peft.LoHaConfig(), peft.IA3Config()])
def test_other_tuners(config):
    with pytest.raises(UnlearningError, match=type(config).__name__):
        check_lora_config(config)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("tied", "target", "kind"),
    [(False, "embed_tokens", "embedding"), (False, "lm_head", "LM head"), (True, "lm_head", "LM head")],
)
def test_embeddings_and_head_are_refused(tied, target, kind, wrapped):
    model = build_llama(tied=tied)
    config = peft.LoraConfig(target_modules=["q_proj", target])
    if wrapped:
        model = peft.get_peft_model(model, config)
    with pytest.raises(UnlearningError, match=f"{target}.*{kind}"):
        check_target_modules(model, config)


def test_tied_hidden_layers_are_refused():
    model = build_llama()
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    with pytest.raises(UnlearningError, match="tied weights"):
        check_target_modules(model, peft.LoraConfig(target_modules=["q_proj"]))
    check_target_modules(model, peft.LoraConfig(target_modules=["v_proj"]))


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", None, r".*\.v_proj"])
def test_hidden_targets_pass(targets):
    check_target_modules(build_llama(tied=True), peft.LoraConfig(target_modules=targets))
    check_target_modules(build_gpt2(), peft.LoraConfig(target_modules=GPT2_TARGETS))
    excluded = peft.LoraConfig(target_modules=["q_proj", "lm_head"], exclude_modules=["lm_head"])
    check_target_modules(build_llama(tied=True), excluded)
