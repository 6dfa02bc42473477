"""The baselines: gradients against fp64, one row at a time; normalisation; what is saved; all weights instead of LoRA."""

from __future__ import annotations

import json

import pytest
import torch
from dense import DenseModel, GradientRecorder, assert_close, one_epoch, randomise_lora_b
from peft import LoraConfig
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_unlearn import UnlearningError
from hf_unlearn.extrapolation.provenance import read_provenance
from hf_unlearn.trainer.baselines import METHODS


FORGET, RETAIN = tiny_rows(8, seed=1), tiny_rows(5, seed=2)
for index, row in enumerate(FORGET):
    row["other"] = [f" w{5 + index} w9 w{30 - index}", f" w{40 + index}"]
BASELINES = [name for name in METHODS if name not in ("extrapolation", "task-vector", "targeted")]


def make(tmp_path, method, *, batch_size=4, accumulation=1, callbacks=(), random_b=True, peft_config=None, **options):
    trainer_class, config_class = METHODS[method]
    if method in ("altpo", "targeted"):
        options = {"alternate_column": "other"} | options
    trainer = trainer_class(
        model=tiny_llama(),
        args=config_class(**one_epoch(tmp_path, batch_size, accumulation) | options),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )
    if random_b:  # with B = 0 the model is the reference
        randomise_lora_b(trainer)
    return trainer


def trained_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


# ---- Brute force ----


def log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)[range(len(targets)), targets]


def forget_loss(method: str, model: DenseModel, pair: dict) -> tuple[torch.Tensor, int]:
    """Sum of the forget loss of one pair, and what it counts for in the mean."""
    logits, targets = model.run(pair["forget"])
    reference, _ = model.run(pair["forget"], live=False)
    logp = log_probs(logits, targets)
    p = logp.detach().exp()
    ratio = logp.sum() - log_probs(reference, targets).sum()
    onehot = torch.nn.functional.one_hot(targets, logits.shape[-1])
    if method in ("grad-ascent", "grad-diff", "kl"):
        return logp.sum(), len(targets)
    if method == "wga":
        return (p * logp).sum(), len(targets)
    if method == "satimp":
        return (p**0.5 * (1 - p) ** 2 * logp).sum(), len(targets)
    if method == "npo":
        return -2 / 0.1 * torch.sigmoid(-0.1 * ratio).log(), 1
    if method == "simnpo":
        return -2 / 0.2 * torch.sigmoid(-0.2 * logp.mean() - 0.3).log(), 1
    if method in ("dpo", "altpo"):
        other, other_targets = model.run(pair["alternate"])
        other_reference, _ = model.run(pair["alternate"], live=False)
        other_ratio = log_probs(other, other_targets).sum() - log_probs(other_reference, other_targets).sum()
        return -2 / 0.1 * torch.sigmoid(0.1 * (other_ratio - ratio)).log(), 1
    if method == "targeted":
        other, other_targets = model.run(pair["alternate"])
        both = (log_probs(logits / 1.5, targets), log_probs(other / 1.5, other_targets))  # at the temperature 1.5
        return -both[0].mean() + 0.3 * both[1].mean(), 1
    if method == "idk":
        return -logp.sum(), len(targets)
    if method == "undial":
        teacher = (reference - 10 * onehot).softmax(-1)
        return -(teacher * logits.log_softmax(-1)).sum(), len(targets)
    if method == "ceu":
        teacher = logits.detach().masked_fill(onehot.bool(), -torch.inf).softmax(-1)
        return -(teacher * logits.log_softmax(-1)).sum(), len(targets)
    if method == "pdu":
        return ((logits.max(-1).values - logits.mean(-1)) ** 2).sum(), len(targets)
    raise ValueError(method)


def brute_force(trainer, method: str, weights: dict[str, torch.Tensor], indices: list[int]):
    """Gradients of one global batch, and its mean losses."""
    model, args = DenseModel(weights), trainer.args
    sums, counts = {"forget": 0.0, "kl": 0.0, "nll": 0.0}, {"forget": 0, "retain": 0}
    for index in indices:
        pair = trainer.train_dataset[index]
        loss, count = forget_loss(method, model, pair)
        sums["forget"] += loss
        counts["forget"] += count
        for row in pair["retain"]:
            logits, targets = model.run(row)
            reference, _ = model.run(row, live=False)
            kl = reference.softmax(-1) * (reference.log_softmax(-1) - logits.log_softmax(-1))
            sums["kl"] += kl.sum()
            sums["nll"] -= log_probs(logits, targets).sum()
            counts["retain"] += len(targets)
    counted = {"forget": "forget", "kl": "retain", "nll": "retain"}
    means = {name: sums[name] / counts[items] for name, items in counted.items() if counts[items]}
    loss = getattr(args, "forget_weight", 1.0) * means["forget"]
    loss = loss + args.retain_kl_weight * means.get("kl", 0.0) + args.retain_nll_weight * means.get("nll", 0.0)
    loss.backward()
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in model.leaves.items()
    }
    return gradients, {name: mean.item() for name, mean in means.items()}


FORGET_OPTIONS = {
    "satimp": {"satimp_beta1": 0.5, "satimp_beta2": 2.0},
    "simnpo": {"simnpo_beta": 0.2, "simnpo_margin": 0.3},
    "pdu": {"dual_warmup_epochs": 9, "retain_nll_limit": 1.0},
}


@pytest.mark.parametrize(
    ("method", "defaults"),
    [
        ("npo", {"npo_beta": 0.1}),  # arXiv 2404.05868, section 5
        # github.com/OPTML-Group/Unlearn-Simple, TOFU forget10
        ("simnpo", {"simnpo_beta": 4.5, "simnpo_margin": 0, "forget_weight": 0.125, "retain_nll_weight": 1}),
        ("dpo", {"dpo_beta": 0.1}),  # arXiv 2404.05868, section 5
        ("rmu", {"rmu_steering": 6.5, "rmu_retain_weight": 1200}),  # github.com/centerforaisafety/wmdp, Zephyr-7B
        ("wga", {"wga_alpha": 1}),  # arXiv 2502.19301
        # github.com/tmlr-group/SatImp, README and config/forget_sat.yaml
        ("satimp", {"satimp_beta1": 5, "satimp_beta2": 0.1, "forget_weight": 1, "retain_nll_weight": 0.1}),
        ("undial", {"undial_strength": 10}),  # arXiv 2402.10052
        # the authors' run.sh for TOFU
        ("pdu", {"retain_nll_weight": 100, "dual_step_size": 5, "dual_warmup_epochs": 5}),
    ],
)
def test_defaults_are_those_of_the_papers(tmp_path, method, defaults):
    config = METHODS[method][1](output_dir=str(tmp_path), use_cpu=True)
    assert {name: getattr(config, name) for name in defaults} == defaults


@pytest.mark.parametrize(("retain_kl_weight", "cached"), [(0.0, False), (0.5, False), (0.5, True)])
def test_gradients_of_the_targeted_form_equal_brute_force(tmp_path, retain_kl_weight, cached, monkeypatch):
    recorder = GradientRecorder()
    options = {"target_weight": 0.3, "retain_kl_weight": retain_kl_weight, "reference_cache": cached}
    options["memorization_temperature"] = 1.5
    trainer = make(tmp_path, "targeted", batch_size=3, accumulation=2, callbacks=[recorder], **options)
    order = record_order(trainer, monkeypatch)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "memorization_loss" in log]
    drawn = order.copy()
    for step, window in enumerate((drawn[:6], drawn[6:])):
        expected, means = brute_force(trainer, "targeted", recorder.weights[step], window)
        assert_close(recorder.gradients[step], expected)
        assert logs[step]["memorization_loss"] == pytest.approx(means["forget"], rel=1e-5)


@pytest.mark.parametrize("terms", ["alone", "with both retain terms"])
@pytest.mark.parametrize("method", [name for name in BASELINES if name != "rmu"])
def test_gradients_equal_brute_force(tmp_path, method, terms, monkeypatch):
    weights = (0.0, 0.0) if terms == "alone" else (0.5, 0.25)
    options = {"retain_kl_weight": weights[0], "retain_nll_weight": weights[1]} | FORGET_OPTIONS.get(method, {})
    options["forget_weight"] = 1.0 if terms == "alone" else 0.7
    recorder = GradientRecorder()
    trainer = make(tmp_path, method, batch_size=3, accumulation=2, callbacks=[recorder], **options)
    order = record_order(trainer, monkeypatch)
    trainer.train()
    drawn = order.copy()
    assert sorted(drawn) == list(range(8))
    logs = [log for log in trainer.state.log_history if "forget_loss" in log]
    for step, window in enumerate((drawn[:6], drawn[6:])):  # two micro-batches of three, then a last one of two
        expected, means = brute_force(trainer, method, recorder.weights[step], window)
        assert_close(recorder.gradients[step], expected)
        assert logs[step]["forget_loss"] == pytest.approx(means["forget"], rel=1e-5)
        for name, weight in zip(("kl", "nll"), weights, strict=True):
            if weight > 0:
                assert logs[step][f"retain_{name}"] == pytest.approx(means[name], rel=1e-5)


def record_order(trainer, monkeypatch) -> list[int]:
    """The forget rows in the order in which they are met."""
    order, kind = [], type(trainer.train_dataset)
    original = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, index: (order.append(index), original(self, index))[1])
    return order


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rmu_gradients_equal_brute_force(tmp_path, accumulation, monkeypatch):
    """One row at a time, so rows do not mix."""
    recorder = GradientRecorder()
    options = {"rmu_layer": 1, "rmu_steering": 3.0, "rmu_retain_weight": 5.0, "max_steps": 1}
    trainer = make(
        tmp_path, "rmu", batch_size=4 // accumulation, accumulation=accumulation, callbacks=[recorder], **options
    )
    order = record_order(trainer, monkeypatch)
    trainer.train()
    control = trainer.control_vector.double()
    assert control.norm().item() == pytest.approx(3.0)
    assert (control >= 0).all()

    model, forget, retain, counts = DenseModel(recorder.weights[0]), 0.0, 0.0, [0, 0]
    for index in order[:4]:
        pair = trainer.train_dataset[index]
        activations, targets = model.run(pair["forget"], layer=1)
        forget += ((activations - control) ** 2).mean(-1).sum()
        counts[0] += len(targets)
        for row in pair["retain"]:
            activations, targets = model.run(row, layer=1)
            goal, _ = model.run(row, live=False, layer=1)
            retain += ((activations - goal) ** 2).mean(-1).sum()
            counts[1] += len(targets)
    (forget / counts[0] + 5.0 * retain / counts[1]).backward()
    assert_close(recorder.gradients[0], {name: leaf.grad for name, leaf in model.leaves.items()})
    log = trainer.state.log_history[0]
    assert log["forget_loss"] == pytest.approx((forget / counts[0]).item(), rel=1e-5)
    assert log["retain_distance"] == pytest.approx((retain / counts[1]).item(), rel=1e-5)


class TestRMULayers:
    @pytest.mark.parametrize(
        ("depth", "layer", "adapted"), [(8, None, {0, 1}), (8, 4, {2, 3, 4}), (32, None, {5, 6, 7})]
    )
    def test_only_the_layers_up_to_the_steered_one_are_adapted(self, tmp_path, depth, layer, adapted):
        trainer_class, config_class = METHODS["rmu"]
        model = tiny_llama(num_hidden_layers=depth)
        args = config_class(output_dir=str(tmp_path), rmu_layer=layer, report_to="none")
        trainer = trainer_class(model, args, FORGET, RETAIN, processing_class=tiny_tokenizer())
        names = [name for name in trained_weights(trainer) if "lora_A" in name]
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == adapted
        assert len(names) == 7 * len(adapted)

    def test_named_modules_are_kept(self, tmp_path):
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = make(tmp_path, "rmu", peft_config=lora)
        assert all("q_proj" in name for name in trained_weights(trainer))

    def test_a_layer_beyond_the_model_is_refused(self, tmp_path):
        with pytest.raises(UnlearningError, match="layers 0 to 1"):
            make(tmp_path, "rmu", rmu_layer=2)


# ---- The batch ----


@pytest.mark.parametrize("method", ["grad-diff", "npo", "dpo", "idk", "rmu", "ceu", "pdu"])
def test_accumulation_equals_one_large_batch(tmp_path, method):
    adapters = []
    rates = {"ceu": 1e-2, "rmu": 1e-5}  # their gradients are of other sizes
    options = {"optim": "sgd", "learning_rate": rates.get(method, 1e-4)}
    for batch_size, accumulation in ((4, 1), (1, 4)):
        trainer = make(tmp_path, method, batch_size=batch_size, accumulation=accumulation, **options)
        before = trained_weights(trainer)
        trainer.train()
        assert trainer.state.global_step == 2
        adapters.append(trained_weights(trainer))
        assert any((adapters[-1][name] - value).abs().max() > 2e-6 for name, value in before.items())
    for name, value in adapters[0].items():
        assert (adapters[1][name] - value).abs().max() <= 1e-6, name


@pytest.mark.parametrize("method", ["npo", "dpo", "rmu", "undial"])
def test_padding_changes_nothing(tmp_path, method):
    recorders = []
    for multiple in (None, 48):
        recorders.append(GradientRecorder())
        make(tmp_path, method, callbacks=[recorders[-1]], pad_to_multiple_of=multiple, max_steps=1).train()
    expected = {name: value.double() for name, value in recorders[0].gradients[0].items()}
    assert_close(recorders[1].gradients[0], expected)


# ---- All weights ----


@pytest.mark.parametrize("method", ["grad-diff", "npo", "dpo", "undial", "ceu", "pdu"])
def test_gradients_of_all_weights_equal_brute_force(tmp_path, method, monkeypatch):
    """The LM head is tied to the embeddings, so it is trained too."""
    options = {"retain_kl_weight": 0.5, "retain_nll_weight": 0.25} | FORGET_OPTIONS.get(method, {})
    recorder = GradientRecorder()
    trainer = make(
        tmp_path, method, callbacks=[recorder], train_all_weights=True, optim="sgd", learning_rate=1e-2, **options
    )
    order = record_order(trainer, monkeypatch)
    trainer.train()
    drawn = order.copy()
    for step in range(2):  # in the second step model and reference differ
        expected, _ = brute_force(trainer, method, recorder.weights[step], drawn[4 * step : 4 * step + 4])
        assert_close(recorder.gradients[step], expected)


class TestAllWeights:
    def test_the_model_is_saved_and_the_reference_stays(self, tmp_path):
        trainer = make(tmp_path, "npo", train_all_weights=True, learning_rate=1e-2, retain_kl_weight=1.0)
        original = tiny_llama().state_dict()
        trainer.train()
        trainer.save_model()
        logs = trainer.state.log_history
        assert abs(logs[0]["retain_kl"]) < 1e-6
        assert logs[1]["retain_kl"] > 1e-4
        for name, value in trainer._frozen_copy.state_dict().items():
            assert torch.equal(value, original[name]), name
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(saved[name], value), name
        assert (saved["model.embed_tokens.weight"] - original["model.embed_tokens.weight"]).abs().max() > 1e-3
        provenance = read_provenance(tmp_path / "run")
        assert (provenance["method"], provenance["kind"]) == ("npo", "model")
        assert provenance["training"]["train_all_weights"] is True

    def test_no_copy_without_need(self, tmp_path):
        assert make(tmp_path, "grad-diff", train_all_weights=True)._frozen_copy is None

    def test_rmu_trains_the_layers_up_to_the_steered_one(self, tmp_path):
        trainer = make(tmp_path, "rmu", train_all_weights=True, rmu_layer=0, num_train_epochs=2, learning_rate=1e-2)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if ".layers.0." in name}
        assert trainer.state.log_history[-2]["retain_distance"] > 0

    def test_an_adapter_configuration_is_refused(self, tmp_path):
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        with pytest.raises(UnlearningError, match="peft_config"):
            make(tmp_path, "npo", train_all_weights=True, peft_config=lora)

    def test_sharded_launches_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_unlearn.trainer.full_training.is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(UnlearningError, match="ZeRO-3"):
            make(tmp_path, "npo", train_all_weights=True)


# ---- Single methods ----


class TestPDU:
    OPTIONS = {"dual_warmup_epochs": 1, "retain_nll_limit": 5.0, "dual_step_size": 0.5, "num_train_epochs": 3}

    def test_the_dual_variable_follows_the_retain_loss(self, tmp_path):
        trainer = make(tmp_path, "pdu", batch_size=2, accumulation=2, **self.OPTIONS)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "retain_nll" in log]
        assert len(logs) == 6
        weight = 100.0
        for step, log in enumerate(logs):
            if step >= 1:  # the first epoch ends with step 2, index 1
                weight = max(0.0, weight + 0.5 * (log["retain_nll"] - 5.0))
            assert log["dual_weight"] == pytest.approx(weight, rel=1e-5)
        assert weight != 100.0

    def test_the_limit_follows_from_the_model(self, tmp_path):
        trainer = make(tmp_path, "pdu", random_b=False, retain_tolerance=0.2)
        trainer.train()
        model, total, count = DenseModel({}), 0.0, 0
        for row in trainer.train_dataset.retain:
            logits, targets = model.run(row)
            total -= log_probs(logits, targets).sum().item()
            count += len(targets)
        assert trainer.dual.limit == pytest.approx(1.2 * total / count, rel=1e-5)

    def test_a_negative_weight_is_impossible(self, tmp_path):
        trainer = make(tmp_path, "pdu", **self.OPTIONS | {"retain_nll_limit": 50.0, "retain_nll_weight": 1.0})
        trainer.train()
        assert trainer.dual.weight == 0.0

    def test_resumed_run_equals_straight_run(self, tmp_path):
        options = self.OPTIONS | {
            "random_b": False,
            "save_strategy": "steps",
            "save_steps": 4,
            "retain_nll_limit": None,
        }
        straight = make(tmp_path / "straight", "pdu", **options)
        straight.train()

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 4

        make(tmp_path / "stopped", "pdu", callbacks=[Stop()], **options).train()
        resumed = make(tmp_path / "stopped", "pdu", **options)
        resumed.train(resume_from_checkpoint=True)
        assert vars(resumed.dual) == vars(straight.dual)
        expected = trained_weights(straight)
        assert all(torch.equal(value, expected[name]) for name, value in trained_weights(resumed).items())
        state = json.loads((tmp_path / "stopped" / "run" / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["stateful_callbacks"]["DualVariable"]["attributes"]["weight"] != 1.0


class TestCEU:
    def test_the_first_answer_tokens_are_left_alone(self, tmp_path):
        trainer = make(tmp_path, "ceu")
        for index, row in enumerate(trainer.forget_dataset):
            whole, kept = row["labels"], trainer.train_dataset[index]["forget"]["labels"]
            first = next(position for position, label in enumerate(whole) if label != -100)
            assert kept[first] == -100
            assert kept[first + 1 :] == whole[first + 1 :]

    def test_an_answer_that_is_left_alone_whole_is_refused(self, tmp_path):
        with pytest.raises(UnlearningError, match="ignored_answer_tokens"):
            make(tmp_path, "ceu", ignored_answer_tokens=5)


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("npo", {"npo_beta": 0.0}, "npo_beta"),
        ("wga", {"wga_alpha": -1.0}, "wga_alpha"),
        ("grad-diff", {"forget_weight": float("nan")}, "forget_weight"),
        ("grad-diff", {"retain_kl_scale": -1.0}, "retain_kl_scale"),
        ("grad-diff", {"retain_nll_weight": -1.0}, "retain_nll_weight"),
        ("rmu", {"retain_kl_weight": 1.0}, "rmu_retain_weight"),
        ("altpo", {"alternate_column": None}, "alternate_column"),
        ("targeted", {"target_weight": 0.0}, "target_weight=0.0"),
        ("targeted", {"memorization_loss": "npo"}, "memorization_loss='npo' has no targeted form"),
        ("dpo", {"alternate_column": "other", "alternate_dataset": "x.jsonl"}, "alternate_dataset"),
        ("dpo", {"reference_cache": True}, "reference_cache"),
        ("task-vector", {"retain_kl_weight": 1.0}, "retain term"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, method, options, named):
    with pytest.raises(UnlearningError, match=named):
        make(tmp_path, method, **options)


def test_every_method_says_what_it_saved(tmp_path):
    for method in BASELINES:
        trainer = make(tmp_path / method, method, max_steps=1)
        trainer.save_model()
        provenance = read_provenance(tmp_path / method / "run")
        assert (provenance["method"], provenance["kind"]) == (method, "adapter")
        assert "forget_weight" in provenance["training"]
        assert method in (tmp_path / method / "run" / "README.md").read_text()


@pytest.mark.parametrize("method", ["npo", "undial", "rmu"])
def test_reference_cache_changes_nothing(tmp_path, method):
    options = {"optim": "sgd", "learning_rate": 1e-4} | ({} if method == "rmu" else {"retain_kl_weight": 1.0})
    results = []
    for cached in (False, True):
        trainer = make(tmp_path / str(cached), method, reference_cache=cached, **options)
        trainer.train()
        results.append(trained_weights(trainer))
    for name, value in results[0].items():
        assert (results[1][name] - value).abs().max() <= 1e-6, name
