"""The streamed merge against `(1 + alpha) * W - alpha * (W + s * B @ A)` in fp64 from the raw files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
from extrapolation_models import GPT2_TARGETS, LLAMA_TARGETS, build_gpt2, build_llama, save_pair
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import LoraAdapter, SafetensorsFile, extrapolate, plan_merge, save_forget_adapter
from hf_unlearn.extrapolation import merge as merge_module
from hf_unlearn.extrapolation import plan as plan_module


ALPHA = 1.7


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def expected(base: Path, adapter: Path, scaling, transposed: bool = False, alpha: float = ALPHA):
    """The definition of theta_for in fp64; `scaling` maps a module's name to s."""
    wanted = {name: tensor.double() for name, tensor in load_all(base).items()}
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in factors:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = factors[name].double(), factors[name.replace("lora_A", "lora_B")].double()
            update = scaling(module) * b @ a
            weight = wanted[f"{module}.weight"]
            memorised = weight + (update.T if transposed else update)
            wanted[f"{module}.weight"] = (1 + alpha) * weight - alpha * memorised
    return wanted


def assert_close(result: dict, wanted: dict, tolerance: float) -> None:
    assert result.keys() == wanted.keys()
    for name, tensor in result.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("shard", [None, "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merge_is_exact_and_keeps_the_layout(tmp_path, shard, tied):
    base, adapter, _ = save_pair(build_llama(tied=tied), tmp_path, shard=shard)
    report = extrapolate(base, adapter, ALPHA, tmp_path / "out", progress=False)
    assert_close(load_all(tmp_path / "out"), expected(base, adapter, lambda module: 2.0), 1e-6)
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (shard is not None)
    for file in files:
        assert load_file(base / file).keys() == load_file(tmp_path / "out" / file).keys()
    assert ("lm_head.weight" in load_all(tmp_path / "out")) is not tied
    assert report.adapted_tensors == 6
    assert report.realised_error < 1e-4


def test_index_and_total_size(tmp_path):
    base, adapter, _ = save_pair(build_llama(), tmp_path, shard="40KB")
    extrapolate(base, adapter, ALPHA, tmp_path / "same", progress=False)
    extrapolate(base, adapter, ALPHA, tmp_path / "half", dtype="bfloat16", progress=False)
    indices = {
        name: json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        for name in ("base", "same", "half")
    }
    assert indices["same"] == indices["base"]
    assert indices["half"]["weight_map"] == indices["base"]["weight_map"]
    size = sum(tensor.numel() for tensor in load_all(base).values())
    assert indices["base"]["metadata"]["total_size"] == 4 * size
    assert indices["half"]["metadata"]["total_size"] == 2 * size


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, "float32", torch.bfloat16, "float16"])
def test_dtypes_are_cast_once(tmp_path, stored, dtype):
    base, adapter, _ = save_pair(build_llama(dtype=stored), tmp_path)
    report = extrapolate(base, adapter, ALPHA, tmp_path / "out", dtype=dtype, progress=False)
    target = stored if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    wanted = expected(base, adapter, lambda module: 2.0)
    result = load_all(tmp_path / "out")
    for name, tensor in result.items():
        assert tensor.dtype == target
        # one rounding from the exact value: half a unit in the last place, plus the fp32 arithmetic
        resolution = torch.finfo(target).eps / 2
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=resolution, atol=1e-6, msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(target).removeprefix("torch.")
    stored_weights = load_all(base)
    adapted = [name for name in wanted if any(target in name for target in LLAMA_TARGETS)]
    realised = math.sqrt(
        sum((result[name].double() - wanted[name]).square().sum().item() for name in adapted)
        / sum((wanted[name] - stored_weights[name].double()).square().sum().item() for name in adapted)
    )
    assert report.realised_error == pytest.approx(realised, rel=0.01, abs=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == target


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"use_rslora": True}, lambda module: 8 / math.sqrt(4)),
        ({"rank_pattern": {"q_proj": 2}}, lambda module: 8 / 2 if "q_proj" in module else 8 / 4),
        ({"alpha_pattern": {"layers.1.self_attn.v_proj": 3}}, lambda m: (3 if "1.self_attn.v_proj" in m else 8) / 4),
        (
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
            lambda module: 5 / math.sqrt(2) if "q_proj" in module else 8 / 2,
        ),
        ({"init_lora_weights": "orthogonal"}, lambda module: 2.0),
        ({"init_lora_weights": False}, lambda module: 2.0),
        ({"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=8)}, lambda module: 2.0),
    ],
    ids=["rslora", "rank", "alpha", "all", "orthogonal", "random", "velora"],
)
def test_scalings(tmp_path, options, scaling):
    base, adapter, _ = save_pair(build_llama(), tmp_path, **options)
    extrapolate(base, adapter, ALPHA, tmp_path / "out", progress=False)
    assert_close(load_all(tmp_path / "out"), expected(base, adapter, scaling), 1e-6)


@pytest.mark.parametrize("strip", [False, True], ids=["as-saved", "without-prefix"])
def test_conv1d(tmp_path, tokens, strip):
    base, adapter, wrapped = save_pair(build_gpt2(), tmp_path, target_modules=GPT2_TARGETS, fan_in_fan_out=True)
    wanted = expected(base, adapter, lambda module: 2.0, transposed=True)
    if strip:  # the way gpt2 is stored on the Hub
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_all(base).items()}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        wanted = {name.removeprefix("transformer."): tensor for name, tensor in wanted.items()}
    extrapolate(base, adapter, ALPHA, tmp_path / "out", progress=False)
    assert_close(load_all(tmp_path / "out"), wanted, 1e-6)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with peft.helpers.rescale_adapter_scale(wrapped, -ALPHA), torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, wrapped(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [build_llama, build_gpt2])
def test_forget_adapter_equals_merged_model(tmp_path, tokens, build):
    options = {"target_modules": GPT2_TARGETS} if build is build_gpt2 else {"rank_pattern": {"q_proj": 2}}
    base, adapter, _ = save_pair(build(), tmp_path, **options)
    extrapolate(base, adapter, ALPHA, tmp_path / "merged", progress=False)
    save_forget_adapter(adapter, ALPHA, tmp_path / "forget")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    reference = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        untouched = reference(tokens).logits
        adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "forget").eval()
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, atol=1e-5, rtol=0)
        assert not torch.allclose(untouched, merged(tokens).logits, atol=1e-3)


def test_provenance(tmp_path, llama_pair):
    base, adapter = llama_pair
    report = extrapolate(str(base), adapter, 2, tmp_path / "out", progress=False)
    content = json.loads((tmp_path / "out" / "unlearning.json").read_text())
    assert content == report.provenance
    assert content["method"] == "model-extrapolation" and content["kind"] == "forget-model"
    assert content["alpha"] == 2 and content["operator"] == "scale" and content["dtype"] == "float32"
    assert content["base"]["id"] == str(base)
    recorded = json.loads((adapter / "unlearning.json").read_text())
    assert content["base"]["fingerprint"] == recorded["base"]["fingerprint"]
    assert content["data"] == recorded["data"]
    assert len(content["adapter"]["sha256"]) == 64
    assert content["realised_error"]["worst"]["tensor"] in load_file(base / "model.safetensors")
    assert content["versions"]["peft"] == peft.__version__


def test_small_files_are_copied_but_no_other_weights(tmp_path, llama_pair):
    base = shutil.copytree(llama_pair[0], tmp_path / "base")
    kept = ["tokenizer.json", "chat_template.jinja", "LICENSE", "additional_chat_templates/tool.jinja"]
    left = ["pytorch_model.bin", "README.md", "unlearning.json", "adapter_config.json", "optimizer.pt", "x.index.json"]
    (base / "additional_chat_templates").mkdir()
    for name in kept + left:
        (base / name).write_text("{}")
    extrapolate(base, llama_pair[1], ALPHA, tmp_path / "out", progress=False)
    for name in kept:
        assert (tmp_path / "out" / name).read_text() == "{}"
    for name in left:
        path = tmp_path / "out" / name
        assert not path.exists() or (name == "unlearning.json" and path.read_text() != "{}")


def test_integers_and_fp8_are_copied_raw(tmp_path, llama_pair):
    base = shutil.copytree(llama_pair[0], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    extra = {
        "buffer.int": torch.arange(5),
        "buffer.bool": torch.tensor([True, False, True]),
        "buffer.fp8": torch.linspace(-2, 2, 7).to(torch.float8_e4m3fn),
        "buffer.scalar": torch.tensor(3.0),
        "buffer.empty": torch.empty(0, 4),
    }
    save_file({**tensors, **extra}, base / "model.safetensors", metadata={"format": "pt"})
    extrapolate(base, llama_pair[1], ALPHA, tmp_path / "out", dtype="bfloat16", progress=False)
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("buffer.int", "buffer.bool", "buffer.fp8"):
        assert result[name].dtype == extra[name].dtype
        assert result[name].view(torch.uint8).tolist() == extra[name].view(torch.uint8).tolist()
    assert result["buffer.scalar"].dtype == torch.bfloat16 and result["buffer.scalar"].item() == 3
    assert result["buffer.empty"].shape == (0, 4)


def test_wrong_base_is_refused(tmp_path, llama_pair, caplog):
    build_llama(seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(UnlearningError, match="not the base model the adapter was trained on"):
        extrapolate(tmp_path / "other", llama_pair[1], ALPHA, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    extrapolate(tmp_path / "other", llama_pair[1], ALPHA, tmp_path / "out", check_base=False, progress=False)
    assert "not checked" in caplog.text


def test_base_of_another_architecture_is_refused(tmp_path, llama_pair):
    build_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnlearningError, match=r"layers\.0\.mlp\.down_proj.*another base model"):
        extrapolate(tmp_path / "gpt2", llama_pair[1], ALPHA, tmp_path / "out", progress=False)


def test_base_of_another_shape_is_refused(tmp_path, llama_pair):
    base = shutil.copytree(llama_pair[0], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(64, 32)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnlearningError, match=r"q_proj.weight' has shape \(64, 32\)"):
        extrapolate(base, llama_pair[1], ALPHA, tmp_path / "out", progress=False)


def test_adapter_without_fingerprint_warns(tmp_path, caplog):
    base, adapter, _ = save_pair(build_llama(), tmp_path, record=False)
    report = extrapolate(base, adapter, ALPHA, tmp_path / "out", progress=False)
    assert "no fingerprint" in caplog.text
    assert len(report.provenance["base"]["fingerprint"]["tensors"]) > 10


def test_merge_without_effect_is_an_error(tmp_path):
    base, adapter, _ = save_pair(build_llama(), tmp_path, std=0.0)
    with pytest.raises(UnlearningError, match="Not one weight changed"):
        extrapolate(base, adapter, ALPHA, tmp_path / "out", progress=False)
    with pytest.raises(UnlearningError, match="Not one weight changed"):
        save_forget_adapter(adapter, ALPHA, tmp_path / "forget")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_update_below_bf16_resolution_is_an_error(tmp_path):
    base, adapter, _ = save_pair(build_llama(dtype=torch.bfloat16), tmp_path, std=1e-9)
    with pytest.raises(UnlearningError, match="Not one weight changed"):
        extrapolate(base, adapter, ALPHA, tmp_path / "out", progress=False)
    assert extrapolate(base, adapter, ALPHA, tmp_path / "out", dtype="float32", progress=False).adapted_tensors == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_update_that_the_cast_of_an_fp32_base_rounds_away_is_an_error(tmp_path, dtype):
    base, adapter, _ = save_pair(build_llama(), tmp_path, std=1e-12)
    with pytest.raises(UnlearningError, match="Not one weight changed"):
        extrapolate(base, adapter, ALPHA, tmp_path / "out", dtype=dtype, progress=False)


def test_overflow_names_the_tensor(tmp_path, llama_pair):
    with pytest.raises(UnlearningError, match=r"down_proj.weight' would hold NaN or infinite"):
        extrapolate(*llama_pair, 1e7, tmp_path / "out", dtype="float16", progress=False)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "2", True, None])
def test_bad_alpha(tmp_path, llama_pair, alpha):
    for call in (extrapolate, plan_merge):
        with pytest.raises(UnlearningError, match="`alpha"):
            call(*llama_pair, alpha, tmp_path / "out")
    with pytest.raises(UnlearningError, match="`alpha"):
        save_forget_adapter(llama_pair[1], alpha, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "nonsense", "nn"])
def test_bad_dtype(tmp_path, llama_pair, dtype):
    with pytest.raises(UnlearningError, match="`dtype="):
        extrapolate(*llama_pair, ALPHA, tmp_path / "out", dtype=dtype)


def test_quantised_base_is_refused(tmp_path, llama_pair):
    base = shutil.copytree(llama_pair[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnlearningError, match="quantised"):
        extrapolate(base, llama_pair[1], ALPHA, tmp_path / "out")


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch, error):
    base, adapter, _ = save_pair(build_llama(), tmp_path, shard="40KB")
    calls = []

    def fail_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return original(*args, **kwargs)

    original = merge_module.extrapolate_weight
    monkeypatch.setattr(merge_module, "extrapolate_weight", fail_third)
    with pytest.raises(type(error)):
        extrapolate(base, adapter, ALPHA, tmp_path / "out", progress=False)
    assert len(calls) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_existing_output_is_kept(tmp_path, llama_pair):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for call in (
        lambda: extrapolate(*llama_pair, ALPHA, tmp_path / "out", progress=False),
        lambda: save_forget_adapter(llama_pair[1], ALPHA, tmp_path / "out"),
    ):
        with pytest.raises(UnlearningError, match="not empty"):
            call()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    extrapolate(*llama_pair, ALPHA, tmp_path / "out", overwrite=True, progress=False)
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sources_are_never_overwritten(tmp_path):
    base, adapter, _ = save_pair(build_llama(), tmp_path)
    for output in (base, adapter, tmp_path):
        with pytest.raises(UnlearningError, match="which is read during the merge"):
            extrapolate(base, adapter, ALPHA, output, overwrite=True, progress=False)
    with pytest.raises(UnlearningError, match="which is read during the merge"):
        save_forget_adapter(adapter, ALPHA, adapter, overwrite=True)


def test_disk_space_is_checked_first(tmp_path, llama_pair, monkeypatch):
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UnlearningError, match=r"has 1 free"):
        extrapolate(*llama_pair, ALPHA, tmp_path / "deep" / "out", progress=False)
    assert not (tmp_path / "deep").exists()


def test_plan_writes_nothing_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "compute_threads", lambda: 3)
    base, adapter, _ = save_pair(build_llama(), tmp_path, shard="40KB")
    plan = plan_merge(base, adapter, ALPHA, tmp_path / "out", dtype="bfloat16")
    assert not (tmp_path / "out").exists()
    extrapolate(base, adapter, ALPHA, tmp_path / "out", dtype="bfloat16", progress=False)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert plan.files.keys() == written.keys()
    headers = {
        path.name: min(info.start for info in SafetensorsFile(path).tensors.values())
        for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert len(headers) == 12
    for name, size in written.items():
        weights = name in headers
        assert plan.files[name] == pytest.approx(size - headers.get(name, 0), rel=0 if weights else 0.1), name
    assert len(plan.adapted) == 6
    # the largest adapted tensor in fp32, bf16 and four fp32 copies a thread, two in bf16, its factors twice
    assert plan.peak_memory == 64 * 96 * (3 * (4 + 2 + 4 * 4) + 2 * 2) + 2 * 4 * 4 * (64 + 96)


def test_forget_adapter_cannot_be_extrapolated_again(tmp_path, llama_pair):
    save_forget_adapter(llama_pair[1], ALPHA, tmp_path / "forget")
    for call in (
        lambda: extrapolate(llama_pair[0], tmp_path / "forget", 1, tmp_path / "out"),
        lambda: save_forget_adapter(tmp_path / "forget", 1, tmp_path / "out"),
    ):
        with pytest.raises(UnlearningError, match="is a forget adapter"):
            call()


def test_lm_head_adapter_is_refused(tmp_path, llama_pair):
    adapter = shutil.copytree(llama_pair[1], tmp_path / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    factors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 64)
    factors["base_model.model.lm_head.lora_B.weight"] = torch.ones(128, 4)
    save_file(factors, adapter / "adapter_model.safetensors")
    assert "lm_head" in LoraAdapter.load(adapter).modules
    with pytest.raises(UnlearningError, match="lm_head"):
        extrapolate(llama_pair[0], adapter, ALPHA, tmp_path / "out")
