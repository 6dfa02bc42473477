"""Extrapolation in rounds, on a tiny model: against sums in fp64, forget models on disk and interrupted runs."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from hf_unlearn import ExtrapolationConfig, UnlearningError, UnlearningTrainer, extrapolate, train_in_rounds
from hf_unlearn.extrapolation import LoraAdapter
from hf_unlearn.extrapolation.operators import sum_of_rounds


FORGET, RETAIN = tiny_rows(6, seed=1), tiny_rows(6, seed=2)
ROUNDS, ALPHA = 3, 0.5
WEIGHTS = "adapter_model.safetensors"


def config(output_dir: Path, **options) -> ExtrapolationConfig:
    defaults = {
        "output_dir": str(output_dir),
        "preset": "paper",
        "per_device_train_batch_size": 6,
        "num_train_epochs": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ExtrapolationConfig(**defaults | options)


def updates(adapter: Path, scaling: float) -> dict[str, torch.Tensor]:
    """The product of the factors of each module in fp64."""
    factors = {name: tensor.double() for name, tensor in load_file(adapter / WEIGHTS).items()}
    products = {}
    for name, a in factors.items():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            products[module] = scaling * factors[name.replace("lora_A", "lora_B")] @ a
    return products


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max((one[name] - other[name]).abs().max().item() for name in one)


def answers(rows: list[dict]) -> list[torch.Tensor]:
    """Token ids of each answer, EOS included."""
    tokenizer = tiny_tokenizer()
    return [
        torch.tensor([*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id])
        for row in rows
    ]


@torch.no_grad()
def answer_log_probs(model: torch.nn.Module, rows: list[dict]) -> list[torch.Tensor]:
    """Log-probabilities of the vocabulary at each answer position of each row."""
    tokenizer, found = tiny_tokenizer(), []
    for row, answer in zip(rows, answers(rows), strict=True):
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        ids = torch.tensor([[*prompt, *answer.tolist()]])
        found.append(model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir) -> SimpleNamespace:
    """Three rounds; the forget model of each round is written apart as well."""
    folder = tmp_path_factory.mktemp("rounds")
    existing, trainers = {}, []

    def train_round(trainer, number, checkpoint):
        assert checkpoint is None
        assert all(earlier() is None for earlier in trainers)  # two models in memory would be one too many
        trainers.append(weakref.ref(trainer))
        existing[number] = sorted(path.parent.name for path in (folder / "run").glob("round-*/base"))
        trainer.train()
        trainer.save_forget_model(folder / f"forget-{number}", alpha=ALPHA)

    options = {"rounds": ROUNDS, "round_alpha": ALPHA, "train_round": train_round}
    result = train_in_rounds(str(tiny_model_dir), config(folder / "run"), FORGET, RETAIN, **options)
    return SimpleNamespace(folder=folder, result=result, base=tiny_model_dir, bases=existing)


class TestResult:
    def test_it_is_the_sum_of_the_rounds(self, run):
        parts = [updates(run.result / f"round-{number}", 32 / 16) for number in (1, 2, 3)]
        wanted = {module: ALPHA * sum(part[module] for part in parts) for module in parts[0]}
        actual = updates(run.result, 1.0)
        assert len(actual) == 14
        assert largest_difference(actual, wanted) < 1e-7
        config = json.loads((run.result / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (ROUNDS * 16, ROUNDS * 16)
        assert largest_difference(parts[0], parts[1]) > 1e-3

    def test_alpha_one_is_the_forget_model_of_the_last_round(self, run, tmp_path):
        extrapolate(run.base, run.result, 1.0, tmp_path / "merged", progress=False)
        merged, last, base = (
            load_file(folder / "model.safetensors")
            for folder in (tmp_path / "merged", run.folder / "forget-3", run.base)
        )
        assert largest_difference(merged, last) < 1e-6
        assert largest_difference(base, last) > 1e-2

    def test_record(self, run):
        record = json.loads((run.result / "unlearning.json").read_text())
        first = json.loads((run.result / "round-1" / "unlearning.json").read_text())
        assert all(record[name] == first[name] for name in ("base", "data", "data_report", "training"))
        assert record["base"]["id"] == str(run.base)
        operator = record["operator"]
        assert (operator["name"], operator["rounds"], operator["round_alpha"]) == ("rounds", ROUNDS, ALPHA)
        hashes = [LoraAdapter.load(run.result / f"round-{number}").sha256 for number in (1, 2, 3)]
        assert [source["sha256"] for source in operator["sources"]] == hashes
        assert "keep it private" in (run.result / "README.md").read_text()
        assert (run.result / "tokenizer.json").exists()

    def test_bases_are_kept_only_while_they_are_needed(self, run):
        assert run.bases == {1: [], 2: ["round-2"], 3: ["round-3"]}
        left = {path.name for path in run.result.iterdir()} | {path.name for path in run.result.glob("round-*/*")}
        assert not {name for name in left if name.startswith(".") or name == "base"}


class TestRounds:
    def test_a_round_is_trained_on_the_forget_model_of_the_one_before(self, run):
        before = AutoModelForCausalLM.from_pretrained(run.folder / "forget-1").double()
        scored = zip(answer_log_probs(before, FORGET), answers(FORGET), strict=True)
        losses = torch.cat([-log_probs.gather(1, ids[:, None])[:, 0] for log_probs, ids in scored])
        history = json.loads((run.result / "round-2" / "trainer_state.json").read_text())["log_history"]
        assert history[0]["memorization_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        first = json.loads((run.result / "round-1" / "trainer_state.json").read_text())["log_history"]
        assert abs(first[0]["memorization_loss"] - history[0]["memorization_loss"]) > 0.1

    def test_the_reference_is_the_original_model_in_every_round(self, run):
        original = answer_log_probs(AutoModelForCausalLM.from_pretrained(run.base).double(), RETAIN)
        for number in (2, 3):
            before = AutoModelForCausalLM.from_pretrained(run.folder / f"forget-{number - 1}").double()
            tokens = [
                (p.exp() * (p - q)).sum(1) for p, q in zip(original, answer_log_probs(before, RETAIN), strict=True)
            ]
            history = json.loads((run.result / f"round-{number}" / "trainer_state.json").read_text())["log_history"]
            assert history[0]["retain_kl"] == pytest.approx(torch.cat(tokens).mean().item(), rel=1e-4)
            assert history[0]["retain_kl"] > 1e-3

    def test_sampled_retain_rows_are_those_of_the_first_round(self, tmp_path, tiny_model_dir):
        args = config(tmp_path / "run", num_train_epochs=2, retain_sample_size=4)
        result = train_in_rounds(str(tiny_model_dir), args, FORGET, rounds=2)
        sampled, of_first = (folder / "retain_sample.jsonl" for folder in (result, result / "round-1"))
        assert sampled.read_bytes() == of_first.read_bytes()
        data = [json.loads((result / f"round-{n}" / "unlearning.json").read_text())["data"] for n in (1, 2)]
        assert data[0] == data[1]
        assert data[0]["retain"]["rows"] == 4
        assert (result / "round-2" / "retain_sample.jsonl").read_bytes() == of_first.read_bytes()

    def test_the_sum_refuses_what_is_no_chain(self, run, tmp_path):
        folders = [run.result / f"round-{number}" for number in (1, 2, 3)]
        for rounds, alpha in (([0, 2], ALPHA), ([1, 0], ALPHA), ([0, 1, 2], 0.25)):
            with pytest.raises(UnlearningError, match="was not trained on the forget model"):
                sum_of_rounds([folders[index] for index in rounds], alpha)
        shutil.copytree(folders[1], tmp_path / "other")
        record = json.loads((tmp_path / "other" / "unlearning.json").read_text())
        record["base"]["forget_model_of"]["base_fingerprint"] = None
        (tmp_path / "other" / "unlearning.json").write_text(json.dumps(record))
        with pytest.raises(UnlearningError, match="other was not trained"):
            sum_of_rounds([folders[0], tmp_path / "other"], ALPHA)
        assert sum_of_rounds(folders[1:], ALPHA).ranks()["model.layers.0.mlp.up_proj"] == 32


class _Stop(TrainerCallback):
    """Raises after a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and Path(args.output_dir).name == "round-2":
            self.step = -1
            raise InterruptedError


class TestResuming:
    def test_it_ends_like_a_run_straight_through(self, run, tmp_path):
        args = config(tmp_path / "run", save_strategy="steps", save_steps=2)
        model, options = str(run.base), {"rounds": ROUNDS, "round_alpha": ALPHA, "callbacks": [_Stop(3)]}
        with pytest.raises(InterruptedError):
            train_in_rounds(model, args, FORGET, RETAIN, **options)
        assert not (tmp_path / "run" / WEIGHTS).exists()
        assert (tmp_path / "run" / "round-2" / "checkpoint-2").is_dir()
        with pytest.raises(UnlearningError, match="holds rounds of an earlier run"):
            train_in_rounds(model, args, FORGET, RETAIN, **options)
        before = (tmp_path / "run" / "round-1" / WEIGHTS).stat().st_mtime_ns
        trained = {}

        def train_round(trainer, number, checkpoint):
            trained[number] = checkpoint and Path(checkpoint).name
            trainer.train(resume_from_checkpoint=checkpoint)

        result = train_in_rounds(model, args, FORGET, RETAIN, resume=True, train_round=train_round, **options)
        assert trained == {2: "checkpoint-2", 3: None}
        assert (result / "round-1" / WEIGHTS).stat().st_mtime_ns == before
        assert largest_difference(load_file(result / WEIGHTS), load_file(run.result / WEIGHTS)) == 0

    def test_a_finished_run_is_only_summed_again(self, run, tmp_path):
        shutil.copytree(run.result, tmp_path / "run")
        (tmp_path / "run" / WEIGHTS).unlink()
        options = {"rounds": ROUNDS, "round_alpha": ALPHA, "train_round": None}
        train_in_rounds(str(run.base), config(tmp_path / "run"), FORGET, RETAIN, resume=True, **options)
        assert (tmp_path / "run" / WEIGHTS).read_bytes() == (run.result / WEIGHTS).read_bytes()
        options["rounds"] = ROUNDS + 1
        with pytest.raises(UnlearningError, match="round-4/base.* is missing"):
            train_in_rounds(str(run.base), config(tmp_path / "run"), FORGET, RETAIN, resume=True, **options)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"round_alpha": 1.0}, "at round_alpha=1.0"),
            ({"forget": tiny_rows(6, seed=5)}, "`forget` is another"),
            ({"learning_rate": 1e-3}, "`learning_rate` is another"),
            ({"base": None}, "is missing"),
        ],
    )
    def test_another_run_is_not_gone_on_with(self, run, tmp_path, change, named):
        def stop(trainer, number, checkpoint):
            if number == 2:
                raise InterruptedError
            trainer.train()

        model, options = str(run.base), {"rounds": 2, "train_round": stop}
        with pytest.raises(InterruptedError):
            train_in_rounds(model, config(tmp_path / "run", num_train_epochs=2), FORGET, RETAIN, **options)
        if "base" in change:
            shutil.rmtree(tmp_path / "run" / "round-2" / "base")
        args = config(tmp_path / "run", num_train_epochs=2, learning_rate=change.get("learning_rate", 1e-2))
        options["round_alpha"] = change.get("round_alpha", ALPHA)
        with pytest.raises(UnlearningError, match=named):
            train_in_rounds(model, args, change.get("forget", FORGET), RETAIN, resume=True, **options)

    def test_overwrite_starts_anew(self, run, tmp_path):
        shutil.copytree(run.result, tmp_path / "run")
        (tmp_path / "run" / "trainer_state.json").write_text("{}")
        args = config(tmp_path / "run", num_train_epochs=2)
        result = train_in_rounds(str(run.base), args, FORGET, RETAIN, rounds=2, overwrite=True)
        assert not (result / "trainer_state.json").exists()
        assert json.loads((result / "unlearning.json").read_text())["operator"]["rounds"] == 2
        assert sorted(path.name for path in result.glob("round-*")) == ["round-1", "round-2"]


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"rounds": 1}, "rounds=1"),
            ({"rounds": 2.0}, "rounds=2.0"),
            ({"rounds": 2, "round_alpha": 0}, "round_alpha=0"),
            ({"rounds": 2, "round_alpha": float("nan")}, "round_alpha=nan"),
            ({"rounds": 2, "trainer_class": UnlearningTrainer}, "UnlearningTrainer does not extrapolate"),
            ({"rounds": 2, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "quantised base"),
            ({"rounds": 2, "resume": True}, "no round to go on from"),
        ],
    )
    def test_by_name_and_before_anything_is_written(self, tmp_path, options, named):
        with pytest.raises(UnlearningError, match=named):
            train_in_rounds("no-such-model", config(tmp_path / "run"), FORGET, RETAIN, **options)
        assert not (tmp_path / "run").exists()

    def test_a_run_without_the_cache(self, tmp_path):
        args = config(tmp_path / "run", reference_cache=False)
        with pytest.raises(UnlearningError, match="reference_cache=False is not possible with rounds"):
            train_in_rounds("no-such-model", args, FORGET, RETAIN, rounds=2)
        assert not (tmp_path / "run").exists()

    def test_a_live_quantised_model(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_unlearn.trainer.rounds.is_quantised", lambda model: True)
        options = {"processing_class": tiny_tokenizer(), "train_round": None, "rounds": 2}
        with pytest.raises(UnlearningError, match="quantised base"):
            train_in_rounds(tiny_llama(), config(tmp_path / "run"), FORGET, RETAIN, **options)
