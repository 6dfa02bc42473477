"""Writing a sharded model, here in a group of one process; tests/distributed has the sharded weights themselves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from extrapolation_models import GPT2_TARGETS, add_adapter, build_gpt2, build_llama, save_pair
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import LoraAdapter, save_live_forget_model
from hf_unlearn.extrapolation.sharded import failing_together, save_sharded_forget_model, whole_adapter


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def options_for(folder) -> dict:
    tokenizer = SimpleNamespace(save_pretrained=lambda path: (path / "tokenizer.json").write_text("{}"))
    return {"tokenizer": tokenizer, "adapter": LoraAdapter.load(folder)}


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("max_shard_size", ["50GB", "40KB"])
@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_it_writes_what_the_unsharded_way_writes(group, tmp_path, tokens, kind, max_shard_size, dtype):
    gpt2 = {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True}
    model = build_gpt2() if kind == "gpt2" else build_llama(tied=kind == "tied")
    _, folder, wrapped = save_pair(model, tmp_path, **(gpt2 if kind == "gpt2" else {}))
    options = options_for(folder) | {"dtype": dtype, "max_shard_size": max_shard_size}
    save_live_forget_model(wrapped, 1.7, tmp_path / "live", **options)
    save_sharded_forget_model(wrapped, 1.7, tmp_path / "sharded", progress=False, **options)
    expected, written = weights(tmp_path / "live"), weights(tmp_path / "sharded")
    assert written.keys() == expected.keys()
    assert all(written[name].dtype == expected[name].dtype for name in expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    names = {path.name for path in (tmp_path / "live").iterdir()}
    assert {path.name for path in (tmp_path / "sharded").iterdir()} == names
    assert ("model.safetensors.index.json" in names) == (max_shard_size == "40KB")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "sharded" / name).read_text() == (tmp_path / "live" / name).read_text()
    records = [json.loads((tmp_path / way / "unlearning.json").read_text()) for way in ("live", "sharded")]
    errors = [record.pop("realised_error") for record in records]  # sums of squares, in another order
    assert records[0] == records[1]
    assert errors[1]["relative"] == pytest.approx(errors[0]["relative"])
    assert errors[1]["worst"]["relative"] == pytest.approx(errors[0]["worst"]["relative"])
    if max_shard_size == "40KB":
        maps = [
            json.loads((tmp_path / way / "model.safetensors.index.json").read_text()) for way in ("live", "sharded")
        ]
        assert maps[0]["weight_map"] == maps[1]["weight_map"]
        assert maps[0]["metadata"]["total_size"] == maps[1]["metadata"]["total_size"]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / way) for way in ("live", "sharded")]
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


def test_files_with_other_names_than_the_live_model_are_refused(group, tmp_path):
    _, folder, wrapped = save_pair(build_llama(), tmp_path)
    wrapped.get_base_model()._weight_conversions = [WeightRenaming("model.blocks", "model.layers")]
    with pytest.raises(UnlearningError, match=r"'model.blocks.0.*hf-unlearn extrapolate"):
        save_sharded_forget_model(wrapped, 1.0, tmp_path / "out", **options_for(folder))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize(
    ("alpha", "dtype", "message"),
    [
        (1e-30, None, "Not one weight changed"),
        (-1.0, None, "memorise more"),
        (1.0, "int8", "no output dtype"),
        (1e8, "float16", "NaN or infinite"),
    ],
)
def test_nothing_is_left_of_a_merge_that_fails(group, tmp_path, alpha, dtype, message):
    _, folder, wrapped = save_pair(build_llama(), tmp_path, std=1.0)
    with pytest.raises(UnlearningError, match=message):
        save_sharded_forget_model(wrapped, alpha, tmp_path / "out", progress=False, dtype=dtype, **options_for(folder))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_an_adapter_of_other_modules_is_refused(group, tmp_path):
    _, folder, _ = save_pair(build_gpt2(), tmp_path, target_modules=GPT2_TARGETS, fan_in_fan_out=True)
    with pytest.raises(UnlearningError, match="c_attn.* has no weight of its own"):
        save_sharded_forget_model(add_adapter(build_llama()), 1.0, tmp_path / "out", **options_for(folder))


def test_a_quantised_base_is_refused(group, tmp_path):
    _, folder, _ = save_pair(build_llama(), tmp_path)
    model = build_llama()
    model.is_quantized = True
    with pytest.raises(UnlearningError, match="quantised"):
        save_sharded_forget_model(add_adapter(model), 1.0, tmp_path / "out", **options_for(folder))


def test_whole_adapter_is_what_peft_saves(tmp_path):
    _, folder, wrapped = save_pair(build_llama(), tmp_path)
    saved = load_file(folder / "adapter_model.safetensors")
    whole = whole_adapter(wrapped.train())
    assert {name.replace(".default", "") for name in whole} == saved.keys()
    assert all(torch.equal(tensor, saved[name.replace(".default", "")]) for name, tensor in whole.items())


class TestFailingTogether:
    def test_one_process_raises_what_it_raises(self):
        with pytest.raises(OSError, match="disk"), failing_together():
            raise OSError("disk")

    def test_a_group_raises_what_a_user_can_read(self, group):
        with (
            pytest.raises(UnlearningError, match="^The main process failed: OSError\\('disk'\\)$"),
            failing_together(),
        ):
            raise OSError("disk")
        with pytest.raises(UnlearningError, match="^Name another.$"), failing_together():
            raise UnlearningError("Name another.")
        with failing_together():
            pass
