"""Base models in 4 and 8 bits, against plain fp32 models that hold the dequantised weights."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer, UnlearningError, extrapolate, quantisation
from hf_unlearn.cli import main
from hf_unlearn.extrapolation.checkpoint import SafetensorsCheckpoint
from hf_unlearn.extrapolation.fingerprint import fingerprint_files


bnb = pytest.importorskip("bitsandbytes")

FORGET, RETAIN, HOLDOUT = tiny_rows(6, seed=1), tiny_rows(4, seed=2), tiny_rows(3, seed=3)
IDS = torch.tensor([[5, 9, 17, 33, 8, 60, 2]])
ALPHA = 1.7
BITS = pytest.mark.parametrize("bits", [4, 8])


def quantization(bits: int) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def make(model, output_dir, trainer_options=None, **options) -> ExtrapolationTrainer:
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "preset": "paper",
        "warmup_steps": 0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    return ExtrapolationTrainer(
        model=model,
        args=ExtrapolationConfig(**defaults | options),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        eval_dataset=HOLDOUT,
        processing_class=tiny_tokenizer(),
        **(trainer_options or {}),
    )


def dequantised(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A plain fp32 model of the same values, dequantised layer by layer."""
    plain = tiny_llama()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, module in model.named_modules():
            weight = weights.get(name.replace(".base_layer", "") + ".weight")
            if isinstance(module, bnb.nn.Linear4bit):
                weight.copy_(bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state))
            elif isinstance(module, bnb.nn.Linear8bitLt):
                scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
                weight.copy_(module.weight.data.float() * scale[:, None] / 127)
    return plain


def load_quantised(folder, bits: int) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization(bits), dtype=torch.float32)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def training_logs(trainer: ExtrapolationTrainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "retain_kl" in log]


def adapter_of(trainer: ExtrapolationTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module", params=[4, 8])
def run(request, tiny_model_dir, tmp_path_factory):
    """Number of bits, a trainer after training with evaluations in between, and the folder of its adapter."""
    folder = tmp_path_factory.mktemp(f"quantised-{request.param}") / "run"
    trainer = make(str(tiny_model_dir), folder, {"quantization_config": quantization(request.param)})
    trainer.train()
    trainer.save_model()
    return request.param, trainer, folder


class TestTraining:
    def test_the_kl_starts_at_0_and_the_loss_falls(self, run):
        _, trainer, _ = run
        logs = training_logs(trainer)
        assert abs(logs[0]["retain_kl"]) < 1e-6
        assert logs[-1]["memorization_loss"] < 0.5 * logs[0]["memorization_loss"]
        assert logs[-1]["retain_kl"] > 0.01

    @BITS
    @pytest.mark.parametrize("options", [{}, {"retain_kl_scale": -1.0}, {"gradient_checkpointing": False}], ids=str)
    def test_it_is_that_of_a_plain_model_with_the_dequantised_weights(self, bits, options, tiny_model_dir, tmp_path):
        """Also after the evaluations in between, after which bitsandbytes would train on packed 4-bit weights."""
        quantised = make(
            str(tiny_model_dir), tmp_path / "q", {"quantization_config": quantization(bits)}, probe_steps=2, **options
        )
        plain = make(dequantised(quantised.peft_model.get_base_model()), tmp_path / "p", probe_steps=2, **options)
        initial = {name: value.clone() for name, value in adapter_of(plain).items()}
        for trainer in (quantised, plain):
            for parameter, value in zip(adapter_of(trainer).values(), initial.values(), strict=True):
                parameter.copy_(value)
            trainer.train()
        for log, expected in zip(quantised.state.log_history, plain.state.log_history, strict=True):
            assert log.keys() == expected.keys()
            for name in expected.keys() & {
                "memorization_loss",
                "retain_kl",
                "probe_forget_loss",
                "eval_loss",
                "grad_norm",
            }:
                assert log[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
        for name, value in adapter_of(plain).items():
            moved = (value - initial[name]).norm()
            assert moved > 0
            assert (adapter_of(quantised)[name] - value).norm() < 1e-2 * moved, name

    @BITS
    def test_the_base_does_not_change(self, bits, tiny_model_dir, tmp_path):
        trainer = make(str(tiny_model_dir), tmp_path, {"quantization_config": quantization(bits)})
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        with trainer.extrapolated(ALPHA) as model:
            logits(model)
        after = dict(trainer.model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_the_adapter_trains_in_fp32(self, run):
        _, trainer, folder = run
        assert {value.dtype for value in adapter_of(trainer).values()} == {torch.float32}
        saved = load_file(folder / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}

    def test_a_quantised_model_object(self, tiny_model_dir, tmp_path):
        trainer = make(load_quantised(tiny_model_dir, 4), tmp_path)
        assert trainer.base_fingerprint == fingerprint_files(SafetensorsCheckpoint(tiny_model_dir))
        trainer.train()
        assert abs(training_logs(trainer)[0]["retain_kl"]) < 1e-6

    def test_bf16(self, tiny_model_dir, tmp_path):
        config = quantization(4)
        config.bnb_4bit_compute_dtype = torch.bfloat16
        options = {"quantization_config": config}
        trainer = make(str(tiny_model_dir), tmp_path, options, model_init_kwargs={"dtype": "bfloat16"})
        trainer.train()
        logs = training_logs(trainer)
        assert abs(logs[0]["retain_kl"]) < 1e-6
        assert logs[-1]["memorization_loss"] < 0.5 * logs[0]["memorization_loss"]


class TestRecord:
    def test_what_is_saved(self, run, tiny_model_dir):
        bits, _, folder = run
        saved = load_file(folder / "adapter_model.safetensors")
        layers, linear_layers = 2, 7
        assert len(saved) == layers * linear_layers * 2
        base = json.loads((folder / "unlearning.json").read_text())["base"]
        assert base["id"] == str(tiny_model_dir)
        assert base["fingerprint"] == fingerprint_files(SafetensorsCheckpoint(tiny_model_dir))
        assert base["quantization_config"][f"load_in_{bits}bit"] is True
        if bits == 4:
            assert base["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
            assert base["quantization_config"]["bnb_4bit_use_double_quant"] is True

    def test_a_plain_base_has_no_such_record(self, tiny_model_dir, tmp_path):
        trainer = make(str(tiny_model_dir), tmp_path)
        assert "quantization_config" not in trainer.provenance()["base"]

    def test_a_base_of_unknown_origin_has_no_fingerprint(self, tiny_model_dir, tmp_path, caplog):
        model = load_quantised(tiny_model_dir, 4)
        model.config._name_or_path = ""
        with caplog.at_level(logging.WARNING):
            trainer = make(model, tmp_path)
        assert trainer.provenance()["base"]["fingerprint"] is None
        assert "no fingerprint" in caplog.text


class TestForgetModel:
    def test_live_it_is_the_plain_model_with_the_update_subtracted(self, run):
        _, trainer, folder = run
        plain = dequantised(trainer.peft_model.get_base_model())
        subtract(plain, folder)
        with trainer.extrapolated(ALPHA) as model:
            live = logits(model)
        assert (live - logits(plain.eval())).abs().max() < 1e-4
        with trainer.extrapolated(0) as model:
            assert (live - logits(model)).abs().max() > 1  # far from the reference

    def test_the_forget_adapter_in_plain_peft_is_the_live_forget_model(self, run, tiny_model_dir, tmp_path):
        bits, trainer, _ = run
        folder = trainer.save_forget_adapter(tmp_path / "forget-adapter", alpha=ALPHA)
        assert "quantization_config" in json.loads((folder / "unlearning.json").read_text())["base"]
        model = PeftModel.from_pretrained(load_quantised(tiny_model_dir, bits), folder)
        with trainer.extrapolated(ALPHA) as live:
            expected = logits(live)
        model.train()  # without dropout; bitsandbytes has kernels of their own, less exact, for inference on CPU
        assert (logits(model) - expected).abs().max() < 1e-5

    def test_the_merge_goes_into_the_full_weights_with_a_warning(self, run, tiny_model_dir, tmp_path, caplog):
        _, _, folder = run
        extrapolate(tiny_model_dir, folder, ALPHA, tmp_path / "forget-model", progress=False)
        messages = [message for message in caplog.messages if "quantised" in message]
        assert len(messages) == 1
        assert "trained on a quantised base" in messages[0]
        assert "--format adapter" in messages[0]
        expected = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        subtract(expected, folder)
        expected = expected.state_dict()
        merged = load_file(tmp_path / "forget-model" / "model.safetensors")
        assert all((merged[name] - expected[name]).abs().max() < 1e-6 for name in merged)
        record = json.loads((tmp_path / "forget-model" / "unlearning.json").read_text())
        assert record["adapter"]["quantization_config"]["quant_method"] == "bitsandbytes"
        assert "quantization_config" not in record["base"]

    def test_the_merge_checks_the_base(self, run, tmp_path):
        _, _, folder = run
        tiny_llama(seed=1).save_pretrained(tmp_path / "other")
        with pytest.raises(UnlearningError, match="not the base model the adapter was trained on"):
            extrapolate(tmp_path / "other", folder, ALPHA, tmp_path / "forget-model", progress=False)

    def test_the_live_model_is_not_merged(self, run, tmp_path):
        _, trainer, _ = run
        with pytest.raises(UnlearningError, match="(?s)quantised.*save_forget_adapter.*extrapolate"):
            trainer.save_forget_model(tmp_path / "forget-model", alpha=ALPHA)
        assert not (tmp_path / "forget-model").exists()

    def test_a_base_stored_in_4_bits(self, tiny_model_dir, tmp_path):
        stored = tmp_path / "stored"
        load_quantised(tiny_model_dir, 4).save_pretrained(stored)
        trainer = make(str(stored), tmp_path / "run")
        trainer.train()
        trainer.save_model()
        assert trainer.provenance()["base"]["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
        with pytest.raises(UnlearningError, match="holds a quantised model"):
            extrapolate(stored, tmp_path / "run", ALPHA, tmp_path / "forget-model", progress=False)
        extrapolate(tiny_model_dir, tmp_path / "run", ALPHA, tmp_path / "forget-model", progress=False)
        tiny_llama(seed=1).save_pretrained(tmp_path / "other")
        with pytest.raises(UnlearningError, match="not the base model the adapter was trained on"):
            extrapolate(tmp_path / "other", tmp_path / "run", ALPHA, tmp_path / "m", progress=False)


def subtract(model: LlamaForCausalLM, adapter) -> None:
    """W - alpha * s * B @ A in fp64, from the saved factors; s = lora_alpha / r = 32 / 16."""
    factors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in factors.items():
            if not name.endswith("lora_A.weight"):
                continue
            b = factors[name.replace("lora_A", "lora_B")]
            weight = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
            weight.copy_(weight.double() - ALPHA * 2 * b.double() @ a.double())


class TestCommands:
    @pytest.fixture
    def sets(self, tmp_path) -> list[str]:
        arguments = []
        for name, rows in {"forget": FORGET, "retain": RETAIN}.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            arguments += [f"--{name}_dataset", str(path)]
        return arguments

    def train(self, model, sets, output_dir, *options: str) -> int:
        arguments = ["train", "--model_name_or_path", str(model), *sets, "--output_dir", str(output_dir)]
        return main([*arguments, "--learning_rate", "1e-2", "--max_steps", "4", "--disable_tqdm", "true", *options])

    @BITS
    def test_train_sweep_and_eval(self, bits, sets, tiny_model_dir, tmp_path):
        run, sweep = tmp_path / "run", tmp_path / "sweep"
        options = [f"--load_in_{bits}bit", *(["--use_bnb_nested_quant"] if bits == 4 else [])]
        assert self.train(tiny_model_dir, sets, run, *options) == 0
        assert json.loads((run / "unlearning.json").read_text())["base"]["quantization_config"][f"load_in_{bits}bit"]
        common = ["--no_generation", "--refinements", "0", "--alphas", str(ALPHA), "--output_dir", str(sweep)]
        assert main(["sweep", "--adapter", str(run), *sets, *common, *options]) in (0, 1)
        reference, live = json.loads((sweep / "evaluation.json").read_text())["evaluations"]
        assert (reference["alpha"], live["alpha"]) == (0.0, ALPHA)

        plain = dequantised(load_quantised(tiny_model_dir, bits))
        for evaluation, name in ((reference, "reference"), (live, "forget-model")):
            plain.save_pretrained(tmp_path / name)
            tiny_tokenizer().save_pretrained(tmp_path / name)
            output = tmp_path / f"{name}-eval"
            model = ["eval", "--model", str(tmp_path / name), "--max_new_tokens", "4", "--output_dir", str(output)]
            assert main([*model, *sets]) in (0, 1)
            expected = json.loads((output / "evaluation.json").read_text())["evaluations"][0]["rows"]
            for rows, columns in expected.items():
                assert evaluation["rows"][rows]["loss"] == pytest.approx(columns["loss"], abs=1e-4), rows
            subtract(plain, run)

    def test_eval_of_a_model(self, sets, tiny_model_dir, tmp_path):
        losses = {}
        for option in ("--load_in_4bit", "--load_in_8bit", None):
            output = tmp_path / str(option)
            arguments = ["eval", "--model", str(tiny_model_dir), *sets, "--max_new_tokens", "4", "--output_dir"]
            assert main([*arguments, str(output), *([option] if option else [])]) in (0, 1)
            evaluation = json.loads((output / "evaluation.json").read_text())["evaluations"][0]
            losses[option] = torch.tensor(evaluation["rows"]["forget"]["loss"])
        error = {option: (losses[option] - losses[None]).abs().mean() for option in losses}
        assert 0 < error["--load_in_8bit"] < 0.5 * error["--load_in_4bit"]

    def test_sweep_dry_run(self, run, sets, tmp_path, capsys):
        bits, _, folder = run
        arguments = ["sweep", "--adapter", str(folder), *sets, "--output_dir", str(tmp_path / "s"), "--dry_run"]
        assert main([*arguments, f"--load_in_{bits}bit"]) == 0
        assert "before they are quantised" in capsys.readouterr().out

    @pytest.mark.parametrize("command", ["sweep", "eval"])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--load_in_4bit", "--load_in_8bit"], "exclude each other"),
            (["--load_in_8bit", "--use_bnb_nested_quant"], "without --load_in_4bit"),
        ],
        ids=["both", "idle"],
    )
    def test_options_that_contradict(self, command, options, message, tmp_path, capsys):
        assert main([command, "--adapter", "run", "--output_dir", str(tmp_path / "s"), *options]) == 2
        assert message in capsys.readouterr().err

    def test_both_numbers_of_bits_in_training(self, sets, tiny_model_dir, tmp_path, capsys):
        assert self.train(tiny_model_dir, sets, tmp_path / "run", "--load_in_4bit", "--load_in_8bit") == 2
        assert "8 bit and 4 bit" in capsys.readouterr().err


class TestRefusals:
    def test_a_model_that_is_loaded_already(self, tmp_path):
        with pytest.raises(UnlearningError, match="quantization_config.*loaded already"):
            make(tiny_llama(), tmp_path, {"quantization_config": quantization(4)})

    def test_given_twice(self, tiny_model_dir, tmp_path):
        kwargs = {"quantization_config": quantization(8)}
        with pytest.raises(UnlearningError, match="given twice"):
            make(str(tiny_model_dir), tmp_path, {"quantization_config": quantization(4)}, model_init_kwargs=kwargs)

    @pytest.mark.parametrize("where", ["argument", "model_init_kwargs"])
    def test_without_bitsandbytes_nothing_is_loaded(self, where, tmp_path, monkeypatch):
        monkeypatch.setattr(quantisation, "is_bitsandbytes_available", lambda: False)
        options = {"quantization_config": quantization(4)}
        given = {"trainer_options": options} if where == "argument" else {"model_init_kwargs": options}
        with pytest.raises(UnlearningError, match=r"pip install hf-unlearn\[quantization\]"):
            make(str(tmp_path / "no such model"), tmp_path, **given)

    @pytest.mark.parametrize("command", ["sweep", "eval"])
    def test_commands_without_bitsandbytes(self, command, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(quantisation, "is_bitsandbytes_available", lambda: False)
        assert main([command, "--adapter", "run", "--output_dir", str(tmp_path / "s"), "--load_in_8bit"]) == 2
        assert "pip install hf-unlearn[quantization]" in capsys.readouterr().err

    @BITS
    def test_a_quantised_head(self, bits, tmp_path):
        tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
        config = quantization(bits)
        config.llm_int8_skip_modules = ["norm"]  # which leaves out the head that is skipped by default
        with pytest.raises(UnlearningError, match="LM head is quantised.*llm_int8_skip_modules"):
            make(str(tmp_path / "untied"), tmp_path, {"quantization_config": config})

    def test_weights_packed_for_inference(self, tmp_path):
        tiny_llama(intermediate_size=128).save_pretrained(tmp_path / "base")
        model = load_quantised(tmp_path / "base", 4)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = True  # whatever this CPU has
                weight = module.weight
                weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
                break
        with pytest.raises(UnlearningError, match="q_proj.*packed for inference.*Load the model again"):
            make(model, tmp_path)
