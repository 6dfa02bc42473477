"""The memory estimate against counts by hand, tensors that autograd saves, live tensors of a step, and packed weights."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer, UnlearningError
from hf_unlearn.cli import main
from hf_unlearn.trainer.memory import Launch, MemoryEstimate, estimate_memory


ROOT = Path(__file__).parents[2]
ACCELERATE = ROOT / "recipes" / "accelerate"
HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 64, 96, 64, 4
# q, k, v, o, gate, up, down of a layer: inputs and outputs; two layers, tied embeddings, norms
SHAPES = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
LINEAR = 2 * sum(inputs * outputs for inputs, outputs in SHAPES)
BASE = LINEAR + VOCABULARY * HIDDEN + 5 * HIDDEN
FACTORS = [RANK * size for shape in 2 * SHAPES for size in shape]
ADAPTER = sum(FACTORS)


def lora() -> LoraConfig:
    return LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def estimate(config=None, **options) -> MemoryEstimate:
    defaults = {"forget_rows": 2, "retain_rows": 2, "length": 10}
    return estimate_memory(config or tiny_llama().config, lora(), **defaults | options)


class TestWeights:
    def test_one_process(self):
        full = estimate()
        assert (full.base_parameters, full.adapter_parameters) == (BASE, ADAPTER)
        assert (full.weights, full.gathered, full.host) == (4 * BASE, 0, 0)
        assert full.adapter == 16 * ADAPTER
        assert full.total == full.weights + full.adapter + full.activations + full.workspace
        half = estimate(dtype=torch.bfloat16, mixed_precision=True)
        assert half.weights == 2 * BASE
        assert half.adapter == 18 * ADAPTER

    def test_ddp_has_everything_in_each_process(self):
        shared = estimate(launch=Launch("ddp", 3))
        assert (shared.weights, shared.adapter) == (4 * BASE, 20 * ADAPTER)

    @pytest.mark.parametrize("stage", [1, 2])
    def test_zero_shards_the_optimizer(self, stage):
        half = {"dtype": torch.float32, "mixed_precision": True}  # DeepSpeed makes bf16 of fp32 weights
        shared = estimate(**half, launch=Launch(f"zero{stage}", 8, reduce_bucket=1000))
        assert shared.weights == 2 * BASE
        gradients, bucket = (2 * ADAPTER, 4000) if stage == 1 else (2 * ADAPTER // 8, 2000)
        assert shared.adapter == 2 * ADAPTER + gradients + 12 * ADAPTER // 8 + bucket

    def test_zero3_shards_the_weights_and_large_factors(self):
        launch = Launch("zero3", 8, reduce_bucket=0, live_parameters=5000, persistence_threshold=300)
        shared = estimate(dtype=torch.bfloat16, mixed_precision=True, launch=launch)
        assert shared.weights == -(-2 * BASE // 8)
        layer = LINEAR // 2 + 2 * HIDDEN  # more than the 5000 that may stay
        assert shared.gathered == 2 * layer + 2 * VOCABULARY * HIDDEN
        whole = sum(size if size <= 300 else size // 8 for size in FACTORS)
        assert 0 < whole < ADAPTER
        assert shared.adapter == 2 * whole + (2 + 12) * ADAPTER // 8

    def test_what_is_offloaded_is_counted_on_the_host(self):
        options = {"reduce_bucket": 0, "persistence_threshold": 0}
        kept = estimate(mixed_precision=True, launch=Launch("zero3", 8, **options))
        moved = estimate(
            mixed_precision=True,
            launch=Launch("zero3", 8, offload_parameters=True, offload_optimizer=True, **options),
        )
        assert moved.weights == 0
        assert moved.host == kept.weights + (12 + 4) * ADAPTER // 8
        assert moved.adapter == (2 + 2) * ADAPTER // 8
        assert moved.gathered == kept.gathered

    def test_fsdp2_gathers_two_layers_and_the_head(self):
        shared = estimate(tiny_llama(num_hidden_layers=4).config, dtype=torch.bfloat16, launch=Launch("fsdp2", 2))
        layer = LINEAR // 2 + 2 * HIDDEN
        base = BASE + LINEAR + 4 * HIDDEN  # two layers more
        assert shared.weights == 2 * base // 2
        assert shared.gathered == 2 * (2 * layer) + 2 * VOCABULARY * HIDDEN
        assert shared.adapter == 16 * (2 * ADAPTER) // 2

    @pytest.mark.parametrize("nested", [True, False])
    def test_four_bits_as_bitsandbytes_packs_them(self, nested, tiny_model_dir):
        pytest.importorskip("bitsandbytes")
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested, **options)
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model_dir, dtype=torch.bfloat16, quantization_config=quantization
        )
        tensors = list(model.parameters())
        for state in [p.quant_state for p in tensors if hasattr(p, "quant_state")]:
            tensors += [state.absmax, *([state.state2.absmax] if nested else [])]
        packed = estimate(dtype=torch.bfloat16, bits=4, nested_quantization=nested)
        assert packed.weights == sum(tensor.nbytes for tensor in tensors)
        assert packed.gathered == 2 * INTERMEDIATE * HIDDEN

    def test_eight_bits_have_a_scale_for_each_output(self):
        outputs = 2 * sum(outputs for _, outputs in SHAPES)
        assert estimate(dtype=torch.bfloat16, bits=8).weights == LINEAR + 4 * outputs + 2 * (BASE - LINEAR)

    def test_zero3_shards_packed_weights_but_not_their_scales(self):
        scales = 4 * LINEAR // 64
        shared = estimate(dtype=torch.bfloat16, bits=4, launch=Launch("zero3", 2))
        part = (LINEAR // 2 + 2 * (BASE - LINEAR)) // 2
        assert shared.weights == scales + part
        moved = estimate(dtype=torch.bfloat16, bits=4, launch=Launch("zero3", 2, offload_parameters=True))
        assert (moved.weights, moved.host) == (scales, part)

    def test_fsdp2_leaves_packed_weights_whole(self):
        packed = estimate(dtype=torch.bfloat16, bits=8).weights - 2 * (BASE - LINEAR)
        assert estimate(dtype=torch.bfloat16, bits=8, launch=Launch("fsdp2", 2)).weights == packed + BASE - LINEAR


class TestActivations:
    @staticmethod
    def saved(num_layers: int, dtype: torch.dtype, autocast: bool, adapter_in_fp32: bool) -> int:
        """Bytes that autograd keeps of a forward of 3 rows of 20 tokens, parameters and their casts left out."""
        model = tiny_llama(num_hidden_layers=num_layers).to(dtype)
        model = get_peft_model(model, lora(), autocast_adapter_dtype=adapter_in_fp32).train()
        shapes = {shape for p in model.parameters() if p.dim() == 2 for shape in (p.shape, p.T.shape)}
        storages, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and (dtype == torch.float32 or tensor.shape not in shapes):
                storages[storage.data_ptr()] = storage
            return tensor

        mask = torch.ones(3, 20, dtype=torch.long)
        mask[0, -5:] = 0
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model.get_base_model().model(input_ids=torch.full((3, 20), 5), attention_mask=mask, use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    @pytest.mark.parametrize(
        ("dtype", "autocast", "strategy"),
        [
            (torch.float32, False, "none"),
            (torch.bfloat16, True, "none"),
            (torch.float32, True, "none"),
            (torch.bfloat16, False, "zero2"),  # where the adapter is in bf16 as well
        ],
    )
    def test_a_layer_keeps_what_autograd_saves(self, dtype, autocast, strategy):
        three, two = (self.saved(layers, dtype, autocast, strategy == "none") for layers in (3, 2))
        estimated = [
            estimate(
                tiny_llama(num_hidden_layers=layers).config,
                forget_rows=1,
                retain_rows=2,
                length=20,
                dtype=dtype,
                mixed_precision=autocast or strategy == "zero2",
                gradient_checkpointing=False,
                launch=Launch(strategy),
            ).activations
            for layers in (3, 2)
        ]
        adapter_casts = 2 * ADAPTER // 2 if autocast and dtype == torch.float32 else 0  # counted with the adapter
        assert three - two - adapter_casts == estimated[0] - estimated[1]

    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_live_tensors_of_a_real_step(self, checkpointing, tmp_path):
        """Rows of 64 tokens, one a little shorter, all scored: the peak of a step on CPU, within a tenth."""
        config = ExtrapolationConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=2,
            max_length=64,
            gradient_checkpointing=checkpointing,
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        sets = [[{"text": f"w{first + row} " * (62 if row else 60)} for row in range(4)] for first in (4, 20)]
        model = tiny_llama(num_hidden_layers=6, intermediate_size=256)
        trainer = ExtrapolationTrainer(model, config, *sets, processing_class=tiny_tokenizer(), peft_config=lora())
        with LiveTensors(trainer.model.parameters()) as live:
            trainer.train()
        expected = estimate(
            model.config,
            forget_rows=4,
            retain_rows=4,
            length=64,
            gradient_checkpointing=checkpointing,
            launch=Launch(on_cpu=True),
        )
        adapter_weights = 4 * expected.adapter_parameters
        assert expected.total - expected.weights == pytest.approx(live.peak + adapter_weights, rel=0.1)

    def test_logits_on_an_accelerator_by_hand(self):
        config = tiny_llama(vocab_size=100_000).config
        small, large = (estimate(config, retain_rows=rows, length=500) for rows in (2, 20))
        bf16 = estimate(config, retain_rows=20, length=500, dtype=torch.bfloat16, mixed_precision=True)
        tile = 4 * 100_000 * 167  # 2^24 / 100,000 positions in fp32; four of them for the divergence
        # before and after the last norm, scored positions, derivatives in fp32; scored positions of the reference
        vectors = 4 + 4 + 4 + 4
        assert small.workspace == 4 * tile + HIDDEN * (2000 * vectors + 1000 * 4)
        assert large.workspace == 4 * tile + HIDDEN * (11000 * vectors + 10000 * 4)
        vectors = 4 + 2 + 2 + 4
        assert bf16.workspace == 4 * tile + HIDDEN * (11000 * vectors + 10000 * 2)
        few = estimate(config, forget_rows=1, retain_rows=1, length=50)
        assert few.workspace == 4 * (4 * 100_000 * 50) + HIDDEN * (100 * (4 + 4 + 4 + 4) + 50 * 4)

    def test_a_head_that_is_cast_by_hand(self):
        config = tiny_llama(vocab_size=100_000).config
        as_is, cast = (
            estimate(config, dtype=dtype, mixed_precision=True) for dtype in (torch.bfloat16, torch.float32)
        )
        assert cast.workspace - as_is.workspace == 2 * 100_000 * HIDDEN
        on_cpu = [
            estimate(config, dtype=dtype, launch=Launch(on_cpu=True)) for dtype in (torch.bfloat16, torch.float32)
        ]
        vectors = HIDDEN * (
            40 * 2 * 2 + 20 * 2
        )  # two kept vectors a token, and one of the reference, are half as wide
        assert on_cpu[0].workspace - on_cpu[1].workspace == 4 * 100_000 * HIDDEN - vectors


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that are alive at the worst moment, those that existed before left out."""

    def __init__(self, existing) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class TestLaunch:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("cpu", Launch(on_cpu=True)),
            ("single_gpu", Launch()),
            ("ddp", Launch("ddp", 8)),
            ("fsdp2", Launch("fsdp2", 8)),
        ],
    )
    def test_recipes_without_deepspeed(self, name, expected):
        assert Launch.from_accelerate_config(ACCELERATE / f"{name}.yaml") == expected

    @pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
    def test_recipes_with_deepspeed(self, name):
        launch = Launch.from_accelerate_config(ACCELERATE / f"{name}.yaml")
        assert (launch.strategy, launch.processes, launch.on_cpu) == (name.split("_")[0], 8, False)
        assert launch.offload_parameters == launch.offload_optimizer == (name == "zero3_offload")
        assert (launch.reduce_bucket, launch.live_parameters) == (500_000_000, 1_000_000_000)

    def test_a_deepspeed_file(self, tmp_path):
        zero = {"stage": 3, "offload_param": {"device": "cpu"}, "reduce_bucket_size": "auto"}
        zero |= {"stage3_max_live_parameters": 7.0, "stage3_param_persistence_threshold": "auto"}
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
        file = self.write(tmp_path, {"deepspeed_config_file": str(tmp_path / "ds.json")})
        expected = Launch("zero3", 4, offload_parameters=True, live_parameters=7)
        assert Launch.from_accelerate_config(file) == expected
        assert expected.describe() == "zero3, 4 processes, weights in host memory"

    def test_what_cannot_be_read_is_named(self, tmp_path):
        (tmp_path / "list.yaml").write_text("- 1\n")
        with pytest.raises(UnlearningError, match=r"list\.yaml is not a configuration"):
            Launch.from_accelerate_config(tmp_path / "list.yaml")
        file = self.write(tmp_path, {"deepspeed_config_file": "missing.json"})
        with pytest.raises(UnlearningError, match=r"missing\.json .*cannot be read"):
            Launch.from_accelerate_config(file)

    @staticmethod
    def write(folder: Path, deepspeed: dict) -> Path:
        file = folder / "launch.yaml"
        config = {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": deepspeed}
        file.write_text(yaml.safe_dump(config))
        return file


def test_a_target_that_is_refused_is_refused_before_anything_is_loaded():
    with pytest.raises(UnlearningError, match="lm_head"):
        estimate_memory(
            tiny_llama().config,
            LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"),
            forget_rows=1,
            retain_rows=1,
            length=4,
        )


def llama(vocab_size, hidden_size, intermediate_size, layers, heads, key_value_heads, **options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=8192,
        **options,
    )


MODELS = {  # and their parameters as published, in billions
    "Llama-3.2-1B": (llama(128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True), 1.2358),
    "Llama-2-7B": (llama(32000, 4096, 11008, 32, 32, 32), 6.7384),
    "Zephyr-7B": (llama(32000, 4096, 14336, 32, 32, 8), 7.2417),
    "Llama-3.1-8B": (llama(128256, 4096, 14336, 32, 32, 8), 8.0303),
    "Llama-3.1-70B": (llama(128256, 8192, 28672, 80, 64, 8), 70.5537),
}
PAGE = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("| ").split("|")]
    for line in PAGE.splitlines()
    if "](../recipes/" in line and line[0] == "|"
]


class TestHardwarePage:
    """Each line of the table is what `hf-unlearn train --dry_run` says, of a folder without weights."""

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]} {row[2]} {row[3]}".replace("/", "-"))
    def test_the_table_is_what_a_dry_run_says(self, row, tmp_path, monkeypatch, capsys):
        name, _, recipe, launch, add, memory, host = row
        config, billions = MODELS[name]
        folder = tmp_path / "model"
        config.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        options = ["--model_name_or_path", folder, "--output_dir", tmp_path / "out"]
        options += add.strip("`").split() if add != "–" else []
        options += self.long_rows(ROOT / self.target(recipe), tmp_path)
        options += ["--accelerate_config", self.launch(launch, tmp_path)]
        assert main(["train", "--config", *map(str, [ROOT / self.target(recipe), *options, "--dry_run"])]) == 0
        text = capsys.readouterr().out
        parameters = int(re.search(r", ([\d,]+) parameters", text)[1].replace(",", ""))
        assert parameters / 1e9 == pytest.approx(billions, abs=5e-5)
        assert "32 forget, 32 retain" in text
        assert f"{float(re.search(r'about ([0-9.]+) GB', text)[1]):.1f} GB" == memory
        on_host = re.search(r"and ([0-9.]+) GB of host memory", text)
        assert (f"{float(on_host[1]):.1f} GB" if on_host else "–") == host

    @staticmethod
    def target(link: str) -> str:
        return re.search(r"\(\.\./(recipes/[\w/]+\.yaml)\)", link)[1]

    def launch(self, cell: str, folder: Path) -> Path:
        """The configuration of a cell such as `[zero3](…), 16 processes`."""
        file = ROOT / self.target(cell)
        processes = re.search(r", (\d+) processes", cell)
        if processes is None:
            return file
        changed = yaml.safe_load(file.read_text(encoding="utf-8")) | {"num_processes": int(processes[1])}
        (folder / "launch.yaml").write_text(yaml.safe_dump(changed))
        return folder / "launch.yaml"

    @staticmethod
    def long_rows(recipe: Path, folder: Path) -> list[object]:
        """Options for sets of 32 rows that all fill `max_length`, where the recipe looks for them."""
        options = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        chosen = []
        for name in ("forget", "retain"):
            rows = [{"text": f"w{4 + index} {name} " * options["max_length"]} for index in range(32)]
            source = folder / name
            source.mkdir()
            (source / "rows.json").write_text(json.dumps(rows))
            split = options.get(f"{name}_split", "train")
            files = {"data_files": [{"split": split, "path": "rows.json"}]}
            configs = [{"config_name": options.get(f"{name}_config", "default"), **files}]
            (source / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
            chosen += [f"--{name}_dataset", source]
        return chosen
