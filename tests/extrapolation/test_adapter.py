"""Reading adapters: what is wrong is named; and what the forget adapter on disk looks like."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from extrapolation_models import add_adapter, build_llama, save_pair
from safetensors.torch import load_file, save_file

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import LoraAdapter, SafetensorsFile, save_forget_adapter


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")


@pytest.fixture
def adapter(tmp_path, llama_pair):
    return shutil.copytree(llama_pair[1], tmp_path / "adapter")


def change_config(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def change_weights(folder, **changes):
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_load(adapter):
    loaded = LoraAdapter.load(adapter)
    factors = load_file(adapter / "adapter_model.safetensors")
    assert len(loaded.modules) == 6 and loaded.config.r == 4
    pair = loaded.modules["model.layers.0.self_attn.q_proj"]
    assert torch.equal(pair.A, factors[Q_A]) and torch.equal(pair.B, factors[Q_B])
    assert pair.scaling == 2 and pair.delta_shape == (64, 64)
    delta = loaded.delta("model.layers.0.self_attn.q_proj")
    wanted = 2 * factors[Q_B].double() @ factors[Q_A].double()
    torch.testing.assert_close(delta.double(), wanted, atol=1e-6, rtol=0)
    assert delta.dtype == torch.float32
    assert loaded.provenance["data"] == {"forget": {"sha256": "00ff"}}


@pytest.mark.parametrize("transposed", [False, True])
def test_delta_rows(adapter, transposed, monkeypatch):
    change_config(adapter, fan_in_fan_out=transposed)
    factors = load_file(adapter / "adapter_model.safetensors")
    loaded = LoraAdapter.load(adapter)
    reads: list[str] = []
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: reads.append(name) or factors[name])
    for projection in ("self_attn.q_proj", "mlp.down_proj", "self_attn.q_proj"):
        module = f"model.layers.0.{projection}"
        a, b = (factors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
        wanted = 2 * b.double() @ a.double()
        wanted = wanted.T if transposed else wanted
        rows = [loaded.delta_rows(module, first, last) for first, last in [(0, 3), (3, 40), (40, len(wanted))]]
        assert all(piece.dtype == torch.float32 for piece in rows)
        torch.testing.assert_close(torch.cat(rows).double(), wanted, atol=1e-6, rtol=0)
    assert len(reads) == 3 * 2  # both factors at each change of the module


@pytest.mark.parametrize("name", [Q_A, Q_B])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_name_the_tensor(adapter, name, value):
    tensor = load_file(adapter / "adapter_model.safetensors")[name]
    tensor[1, 2] = value
    change_weights(adapter, **{name: tensor})
    with pytest.raises(UnlearningError, match=name):
        LoraAdapter.load(adapter)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_missing_factor(adapter, factor):
    change_weights(adapter, **{Q_A.replace("lora_A", f"lora_{factor}"): None})
    with pytest.raises(UnlearningError, match=rf"lora_{factor}.*q_proj.*missing"):
        LoraAdapter.load(adapter)


@pytest.mark.parametrize("options", [{"r": 8}, {"rank_pattern": {"q_proj": 2}}])
def test_rank_mismatch(adapter, options):
    change_config(adapter, **options)
    with pytest.raises(UnlearningError, match="says rank"):
        LoraAdapter.load(adapter)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.lm_head.weight",
    ],
)
def test_other_tensors_are_refused(adapter, key):
    change_weights(adapter, **{key: torch.ones(4, 4)})
    with pytest.raises(UnlearningError, match=key):
        LoraAdapter.load(adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"target_parameters": ["experts.down_proj"]},
        {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}},
        {"option_of_the_future": True},
    ],
)
def test_options_in_the_file_are_checked(adapter, options):
    change_config(adapter, **options)
    with pytest.raises(UnlearningError, match=next(iter(options))):
        LoraAdapter.load(adapter)


def test_unknown_option_that_is_off_is_ignored(adapter):
    change_config(adapter, option_of_the_future=False)
    assert LoraAdapter.load(adapter)


def test_missing_or_damaged_files(adapter):
    with pytest.raises(UnlearningError, match="does not exist"):
        LoraAdapter.load(adapter / "absent")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UnlearningError, match=r"adapter_model\.safetensors"):
        LoraAdapter.load(adapter)
    for content in ("{", '{"peft_type": "NONE"}', '{"r": 4}'):
        (adapter / "adapter_config.json").write_text(content)
        with pytest.raises(UnlearningError, match=r"peft_config|adapter_config"):
            LoraAdapter.load(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UnlearningError, match=r"adapter_config\.json"):
        LoraAdapter.load(adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forget_adapter_files(tmp_path, dtype):
    wrapped = add_adapter(build_llama(), use_rslora=True, rank_pattern={"q_proj": 2})
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert save_forget_adapter(tmp_path / "adapter", 3, tmp_path / "forget") == tmp_path / "forget"
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "forget" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wanted = tensor if "lora_A" in name else (-3 * tensor.double()).to(dtype)
        assert torch.equal(after[name], wanted) and after[name].dtype == dtype
    config, original = (peft.PeftConfig.from_pretrained(tmp_path / name) for name in ("forget", "adapter"))
    assert config.inference_mode and config.lora_alpha == 8
    assert config.use_rslora and config.rank_pattern == original.rank_pattern
    assert config.base_model_name_or_path == original.base_model_name_or_path
    content = json.loads((tmp_path / "forget" / "unlearning.json").read_text())
    assert content["kind"] == "forget-adapter" and content["alpha"] == 3
    assert content["dtype"] == str(dtype).removeprefix("torch.")
    error = content["realised_error"]["relative"]
    assert error == 0 if dtype == torch.float32 else 1e-4 < error < 2**-8


def test_forget_adapter_keeps_the_record_of_the_base(tmp_path):
    _, adapter, _ = save_pair(build_llama(), tmp_path)
    save_forget_adapter(LoraAdapter.load(adapter), 0.5, tmp_path / "forget")
    recorded = json.loads((adapter / "unlearning.json").read_text())
    content = json.loads((tmp_path / "forget" / "unlearning.json").read_text())
    assert content["base"]["fingerprint"] == recorded["base"]["fingerprint"]
    assert content["data"] == recorded["data"]


@pytest.mark.parametrize("init", ["mica", "orthogonal"])
def test_forget_adapter_of_other_initialisations(tmp_path, tokens, init):
    wrapped = add_adapter(build_llama(), init_lora_weights=init)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            parameter.data.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    save_forget_adapter(tmp_path / "adapter", 2, tmp_path / "forget")
    loaded = peft.PeftModel.from_pretrained(build_llama(), tmp_path / "forget").eval()
    with torch.no_grad(), peft.helpers.rescale_adapter_scale(wrapped, -2):
        torch.testing.assert_close(loaded(tokens).logits, wrapped(tokens).logits, atol=1e-5, rtol=0)
