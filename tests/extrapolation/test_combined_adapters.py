"""What is written of a combination, what the rest of the package makes of it, and what is refused."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from extrapolation_models import GPT2_TARGETS, add_adapter, build_gpt2, build_llama, save_pair
from random_adapters import SHAPES, dense, save_random
from safetensors.torch import load_file

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import (
    LoraAdapter,
    SignConsensus,
    average,
    extrapolate,
    fingerprint_model,
    fisher_factors,
    momentum,
    momentum_weights,
    plan_merge,
    project,
    save_forget_adapter,
    scale_layers,
    subtract,
    truncate,
    write_provenance,
)


@pytest.mark.parametrize("build", [build_llama, build_gpt2])
def test_result_is_an_ordinary_adapter(tmp_path, tokens, build):
    """It loads in PEFT, and merges there and here to the weights of the brute force."""
    options = {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True} if build is build_gpt2 else {"use_rslora": True}
    ranked = "c_attn" if build is build_gpt2 else "q_proj"
    base, first, _ = save_pair(build(), tmp_path / "first", seed=1, **options)
    _, second, _ = save_pair(build(), tmp_path / "second", seed=2, rank_pattern={ranked: 2}, **options)
    saved = average([first, second], [0.5, 1]).save(tmp_path / "out")
    one, two = (dense(LoraAdapter.load(folder)) for folder in (first, second))
    merged = peft.PeftModel.from_pretrained(build(), tmp_path / "out").merge_and_unload()
    forget = save_forget_adapter(saved, 2.0, tmp_path / "forget")
    forgotten = peft.PeftModel.from_pretrained(build(), forget).merge_and_unload()
    extrapolate(base, saved, 2.0, tmp_path / "model", progress=False)
    written = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in build().state_dict().items():
        module = name.removesuffix(".weight")
        delta = 0.5 * one[module] + two[module] if module in one else torch.zeros((), dtype=torch.float64)
        delta = delta.T if "fan_in_fan_out" in options and module in one else delta
        for alpha, state in ((-1, merged.state_dict()), (2, forgotten.state_dict()), (2, written)):
            if name in state:
                wanted = weight.double() - alpha * delta
                torch.testing.assert_close(state[name].double(), wanted, atol=1e-6, rtol=0)
    assert saved.provenance["base"] == json.loads((first / "unlearning.json").read_text())["base"] | {
        "id": saved.config.base_model_name_or_path,
        "revision": None,
    }


def test_provenance(tmp_path):
    record = {"base": {"id": "the-base", "revision": "r1"}, "data": {"forget": {"sha256": "00ff"}}, "kind": "adapter"}
    first = save_random(tmp_path / "first", 0, provenance=record)
    second = save_random(tmp_path / "second", 1)
    saved = subtract(first, second, 0.5).save(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "unlearning.json").read_text())
    assert content["kind"] == "adapter" and content["method"] == "model-extrapolation"
    assert content["base"] == {"id": "the-base", "revision": "r1", "fingerprint": None}
    assert content["data"] == record["data"] and content["versions"]["peft"] == peft.__version__
    assert content["operator"] == {
        "name": "subtract",
        "weight": 0.5,
        "sources": [
            {"id": str(first.folder), "sha256": first.sha256, "base": "the-base"},
            {"id": str(second.folder), "sha256": second.sha256, "base": None},
        ],
    }
    assert "keep it private" in (tmp_path / "out" / "README.md").read_text()
    again = average([saved, second]).save(tmp_path / "again").provenance["operator"]["sources"]
    assert again[0]["operator"] == content["operator"] and "operator" not in again[1]
    forget = save_forget_adapter(saved, 1.0, tmp_path / "forget")
    assert json.loads((forget / "unlearning.json").read_text())["operator"] == content["operator"]


def test_retain_vector_of_a_clean_checkpoint_into_the_target(tmp_path):
    """MSA: both adapters are trained on one clean checkpoint, and their difference is added to another model."""
    _, first, _ = save_pair(build_llama(seed=0), tmp_path / "clean", seed=1)
    _, second, _ = save_pair(build_llama(seed=0), tmp_path / "retain", seed=2)
    target = tmp_path / "target"
    build_llama(seed=5).save_pretrained(target)
    saved = subtract(first, second, 0.5).save(tmp_path / "vector")
    with pytest.raises(UnlearningError, match="no_check_base"):
        plan_merge(target, saved, 2.0, tmp_path / "out")
    report = extrapolate(target, saved, 2.0, tmp_path / "out", check_base=False, progress=False)
    name = "model.layers.1.mlp.down_proj"
    before, after = load_file(target / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    one, two = (dense(LoraAdapter.load(folder))[name] for folder in (first, second))
    wanted = before[f"{name}.weight"].double() - 2 * one + 1 * two
    torch.testing.assert_close(after[f"{name}.weight"].double(), wanted, atol=1e-6, rtol=0)
    assert report.provenance["base"]["id"] == str(target)
    target_print = fingerprint_model(build_llama(seed=5))
    assert report.provenance["base"]["fingerprint"] == target_print
    assert target_print != fingerprint_model(build_llama(seed=0))
    assert report.provenance["operator"]["sources"][0]["id"] == str(first)
    assert report.provenance["operator"]["name"] == "subtract"


@pytest.fixture
def three(tmp_path):
    return [save_random(tmp_path / f"adapter-{seed}", seed, r=rank) for seed, rank in enumerate((3, 2, 4))]


class TestRefused:
    def test_forget_adapters(self, three, tmp_path):
        forget = save_forget_adapter(three[0], 1.0, tmp_path / "forget")
        for combine in (
            lambda: average([three[1], forget]),
            lambda: project(three[1], forget),
            lambda: SignConsensus([three[1], forget]),
            lambda: scale_layers(forget, dict.fromkeys(SHAPES, 1.0)),
        ):
            with pytest.raises(UnlearningError, match="is a forget adapter"):
                combine()

    def test_other_bases(self, tmp_path):
        folders = [save_pair(build_llama(seed), tmp_path / str(seed))[1] for seed in (0, 1)]
        with pytest.raises(UnlearningError, match=r"different base models.*train both on the same"):
            average(folders)
        live = add_adapter(build_llama(0, dtype=torch.bfloat16))
        live.save_pretrained(tmp_path / "bf16")
        write_provenance(tmp_path / "bf16", {"base": {"fingerprint": fingerprint_model(live)}})
        assert average([folders[0], tmp_path / "bf16"]).norm > 0  # of another precision: nothing to compare

    def test_other_shapes(self, tmp_path):
        first = save_random(tmp_path / "first", 0)
        other = save_random(tmp_path / "other", 1, shapes={"model.a": (6, 9)})
        with pytest.raises(UnlearningError, match=r"'model.a' have shape \(6, 10\).*\(6, 9\)"):
            subtract(first, other, 1.0)
        transposed = save_random(tmp_path / "transposed", 1, fan_in_fan_out=True)
        with pytest.raises(UnlearningError, match="fan_in_fan_out"):
            average([first, transposed])

    def test_nothing_left(self, three, tmp_path):
        for number, update in enumerate([subtract(three[0], three[0], 1.0), project(three[0], three[0])]):
            with pytest.raises(UnlearningError, match="Nothing is left"):
                update.save(tmp_path / f"out-{number}")
            assert not (tmp_path / f"out-{number}").exists()

    def test_output_that_is_a_source(self, three):
        with pytest.raises(UnlearningError, match="read during the merge"):
            average(three).save(three[1].folder, overwrite=True)

    @pytest.mark.parametrize(
        ("combine", "named"),
        [
            (lambda adapters: average([]), "no adapters"),
            (lambda adapters: average(adapters, [1, 2]), "`weights` must be 3"),
            (lambda adapters: average(adapters, [1, 2, math.nan]), "`weights` must be 3"),
            (lambda adapters: momentum(adapters, 1.0), "eta=1.0"),
            (lambda adapters: momentum(adapters, 0), "eta=0"),
            (lambda adapters: momentum_weights(0), "0 snapshots"),
            (lambda adapters: momentum(adapters[0].folder), "0 `checkpoint-"),
            (lambda adapters: subtract(*adapters[:2], 0), "weight=0"),
            (lambda adapters: subtract(*adapters[:2], math.inf), "weight=inf"),
            (lambda adapters: scale_layers(adapters[0], {"model.a": 1}), "'model.b' has no factor"),
            (lambda adapters: scale_layers(adapters[0], dict.fromkeys([*SHAPES, "c"], 1)), "'c' is no module"),
            (lambda adapters: scale_layers(adapters[0], {"model.a": -1, "model.b": 1}), "'model.a' is -1"),
            (lambda adapters: scale_layers(adapters[0], dict.fromkeys(SHAPES, 0)), "Every factor is 0"),
            (lambda adapters: fisher_factors(adapters[0], {"model.a": 1}, {}), "`forget_fisher` has no value"),
            (
                lambda adapters: fisher_factors(adapters[0], dict.fromkeys(SHAPES, 0), dict.fromkeys(SHAPES, 1)),
                "no gradient",
            ),
            (lambda adapters: truncate(adapters[0], 0), "`rank`"),
            (lambda adapters: truncate(adapters[0], 2.5), "`rank`"),
        ],
    )
    def test_values(self, tmp_path, combine, named):
        adapters = [save_random(tmp_path / str(seed), seed) for seed in range(3)]
        with pytest.raises(UnlearningError, match=named):
            combine(adapters)
