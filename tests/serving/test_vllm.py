"""The rules of vLLM, one at a time, and the adapter that is rewritten to keep them."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_adapters import peft_logits, save_forget_adapter, updates

from hf_unlearn import UnlearningError
from hf_unlearn.extrapolation import LoraAdapter
from hf_unlearn.serving import check_servable, write_servable, write_uniform
from hf_unlearn.serving.vllm import smallest_rank


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
VARIANTS = {
    "plain": {},
    "rank-24": {"r": 24, "lora_alpha": 16},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 11}},
    "scales": {"alpha_pattern": {"v_proj": 5, "o_proj": 18}},
    "rslora-ranks-scales": {"use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"k_proj": 1}},
}


def write_adapter(folder, tensors=None, **options):
    """A hand-made adapter of one module of rank 8."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in (CONFIG | options).items() if value != "absent"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = tensors or {A("A"): torch.ones(8, 6), A("B"): torch.ones(5, 8)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


class TestRules:
    def test_an_adapter_that_keeps_them(self, tmp_path):
        report = check_servable(write_adapter(tmp_path / "a"))
        assert report.servable and report.problems == []
        assert report.ranks == (8,) and report.max_lora_rank == 8

    @pytest.mark.parametrize(
        ("rank", "wanted"),
        [(1, 8), (8, 8), (9, 16), (24, 32), (64, 64), (100, 128), (257, 320), (321, 512), (512, 512), (513, None)],
    )
    def test_smallest_rank(self, rank, wanted):
        assert smallest_rank(rank) == wanted

    @pytest.mark.parametrize(
        ("options", "what", "mendable"),
        [
            ({"peft_type": "LOHA"}, "peft_type", False),
            ({"r": "absent"}, "r", False),
            ({"lora_alpha": "absent"}, "lora_alpha", False),
            ({"target_modules": None}, "target_modules", False),
            ({"bias": "all"}, "bias", False),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save", False),
            ({"use_dora": True}, "use_dora", False),
            ({"lora_bias": True}, "lora_bias", False),
            ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens", False),
            ({"layer_replication": [[0, 2]]}, "layer_replication", False),
            ({"use_bdlora": {"nblocks": 2}}, "use_bdlora", False),
            ({"use_qalora": True}, "use_qalora", False),
            ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights", False),
            ({"rank_pattern": {"k_proj": 4}}, "rank_pattern", True),
            ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern", True),
            ({"r": 16}, "r", False),
        ],
        ids=str,
    )
    def test_each_option(self, tmp_path, options, what, mendable):
        problems = check_servable(write_adapter(tmp_path / "a", **options)).problems
        assert {(problem.what, problem.mendable) for problem in problems} == {(what, mendable)}

    @pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal", True, False])
    def test_initialisations_that_leave_the_base_alone(self, tmp_path, start):
        assert check_servable(write_adapter(tmp_path / "a", init_lora_weights=start)).servable

    @pytest.mark.parametrize(
        ("tensors", "what"),
        [
            ({A("A"): torch.ones(8, 6)}, "model.layers.0.self_attn.q_proj"),
            (
                {A("A"): torch.ones(8, 6), A("B"): torch.ones(5, 8), "x.embed_tokens.weight": torch.ones(2, 2)},
                "x.embed",
            ),
            ({A("A"): torch.ones(8, 6), A("B"): torch.ones(5, 8), A("A")[:-7]: torch.ones(2)}, "q_proj.lora_A"),
            ({A("A"): torch.ones(2, 8, 6), A("B"): torch.ones(5, 8)}, "q_proj.lora_A.weight"),
            ({A("A"): torch.ones(600, 2), A("B"): torch.ones(2, 600)}, "r"),
            ({"x": torch.ones(2)}, "x"),
        ],
        ids=["no-B", "embedding", "name", "three-dimensions", "rank-600", "none"],
    )
    def test_each_tensor(self, tmp_path, tensors, what):
        rank = 600 if what == "r" else 8
        problems = check_servable(write_adapter(tmp_path / "a", tensors, r=rank)).problems
        assert what in problems[0].what and not problems[0].mendable

    def test_weights_that_can_run_code(self, tmp_path):
        folder = write_adapter(tmp_path / "a")
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        assert [problem.what for problem in check_servable(folder).problems] == ["adapter_model.safetensors"]

    def test_all_problems_are_named_at_once(self, tmp_path):
        folder = write_adapter(tmp_path / "a", use_dora=True, bias="lora_only", alpha_pattern={"q_proj": 2})
        with pytest.raises(UnlearningError, match=r"(?s)bias.*lora_only.*use_dora") as error:
            write_servable(folder, tmp_path / "b")
        assert "alpha_pattern" not in str(error.value)  # that one would be mended
        assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_rewriting_keeps_the_update(tiny_model_dir, tmp_path, options):
    source = save_forget_adapter(tiny_model_dir, tmp_path / "a", **options)
    report = write_servable(source, tmp_path / "b")
    assert report.servable

    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    ranks = {tensor.shape["lora_B" in name] for name, tensor in tensors.items()}
    assert ranks == {config["r"]} == set(report.ranks) and config["r"] == report.max_lora_rank

    wanted, found = updates(source), updates(tmp_path / "b", patterns=False)
    one_scale = "alpha_pattern" not in options and "rank_pattern" not in options
    tolerance = 1e-15 if one_scale else 1e-7  # fp64, or what fp32 holds
    assert wanted.keys() == found.keys()
    for module in wanted:
        assert (found[module] - wanted[module]).norm() <= tolerance * wanted[module].norm(), module
    tokens = torch.tensor([[1, 9, 30, 12, 55, 41, 8]])
    before, after = (peft_logits(tiny_model_dir, folder, tokens) for folder in (source, tmp_path / "b"))
    torch.testing.assert_close(after, before, atol=1e-10 if one_scale else 1e-5, rtol=0)
    assert (before - peft_logits(tiny_model_dir, None, tokens)).abs().max() > 0.1  # the adapter does something


def test_patterns_matter(tiny_model_dir, tmp_path):
    source = save_forget_adapter(tiny_model_dir, tmp_path / "a", **VARIANTS["scales"])
    module = "model.layers.0.self_attn.o_proj"
    ratio = updates(source)[module].norm() / updates(source, patterns=False)[module].norm()
    assert ratio.item() == pytest.approx(2)  # 18 / 9: what a server that ignores them would lose


def test_factors_of_one_scale_are_kept_bit_for_bit(tiny_model_dir, tmp_path):
    source = save_forget_adapter(tiny_model_dir, tmp_path / "a", dtype=torch.bfloat16, r=24, lora_alpha=16)
    write_servable(source, tmp_path / "b")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "b"))
    for name, tensor in before.items():
        kept = after[name][:, :24] if "lora_B" in name else after[name][:24]
        rest = after[name][:, 24:] if "lora_B" in name else after[name][24:]
        assert after[name].dtype == torch.bfloat16 and kept.equal(tensor) and not rest.any() and rest.numel()
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 16 / 24


def test_the_record_goes_on(tiny_model_dir, tmp_path):
    source = save_forget_adapter(tiny_model_dir, tmp_path / "a")
    write_servable(source, tmp_path / "b")
    record = json.loads((tmp_path / "b" / "unlearning.json").read_text())
    assert (record["kind"], record["alpha"]) == ("forget-adapter", 2.0)
    wanted = {"rank": 8, "lora_alpha": 12.0, "source": {"id": str(source), "sha256": LoraAdapter.load(source).sha256}}
    assert record["serving"] == wanted


def test_a_memorising_adapter_is_not_served(tiny_model_dir, tmp_path):
    source = save_forget_adapter(tiny_model_dir, tmp_path / "a", kind="adapter")
    with pytest.raises(UnlearningError, match=r"no forget adapter.*extrapolate .*--format adapter"):
        write_servable(source, tmp_path / "b")


def test_the_source_is_not_overwritten(tiny_model_dir, tmp_path):
    source = save_forget_adapter(tiny_model_dir, tmp_path / "a")
    with pytest.raises(UnlearningError, match="Name another"):
        write_uniform(LoraAdapter.load(source), source, 8, overwrite=True)


def test_the_command_line(tmp_path):
    report = check_servable(write_adapter(tmp_path / "an adapter", base_model_name_or_path="org/base"))
    words = shlex.split(report.command("gone"))
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert words[words.index("--lora-modules") + 1] == f"gone={(tmp_path / 'an adapter').resolve()}"
