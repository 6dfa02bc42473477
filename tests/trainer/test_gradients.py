"""The training step against a brute-force reference: fp64, one row at a time, plain logits, merged weights."""

from __future__ import annotations

import pytest
import torch
from dense import GradientRecorder, assert_close, one_epoch, randomise_lora_b
from tiny import VOCABULARY, tiny_llama, tiny_rows, tiny_tokenizer
from torch.func import functional_call
from transformers import OPTConfig, OPTForCausalLM, TrainerCallback

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer


FORGET, RETAIN = tiny_rows(7, seed=1), tiny_rows(5, seed=2)


def tiny_opt() -> OPTForCausalLM:
    """Its feed-forward layers get the tokens of all rows in one line."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "dropout": 0.0}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = OPTConfig(vocab_size=VOCABULARY, num_attention_heads=4, init_std=0.2, **sizes, **special)
    return OPTForCausalLM(config)


def make_trainer(tmp_path, *, batch_size=4, accumulation=1, callbacks=(), random_b=True, model=tiny_llama, **options):
    trainer = ExtrapolationTrainer(
        model=model(),
        args=ExtrapolationConfig(**one_epoch(tmp_path, batch_size, accumulation) | options),
        forget_dataset=FORGET,
        retain_dataset=RETAIN,
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )
    if random_b:  # with B = 0 the gradient of A vanishes and the retain term has none
        randomise_lora_b(trainer)
    return trainer


def brute_force(trainer, lora: dict[str, torch.Tensor], pairs: list[int], model=tiny_llama, **options):
    """Gradients and mean losses of one global batch; nothing of the package but the tokenised rows is used."""
    scale, temperature = trainer.args.retain_kl_scale, trainer.args.memorization_temperature
    model = model().double()
    leaves = {name: value.double().requires_grad_() for name, value in lora.items()}

    def logits(ids: list[int], adapter_scale: float) -> torch.Tensor:
        weights = dict(model.state_dict())
        for name in leaves:
            if "lora_A" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
                product = leaves[name.replace("lora_A", "lora_B")] @ leaves[name]
                weights[f"{module}.weight"] = weights[f"{module}.weight"] + adapter_scale * (32 / 16) * product
        return functional_call(model, weights, (torch.tensor([ids]),), tie_weights=False).logits[0, :-1]

    memorization, kl, nll, num_forget, num_retain = 0.0, 0.0, 0.0, 0, 0
    beta = 0.1
    for index in pairs:
        pair = trainer.train_dataset[index]
        ids, labels = pair["forget"]["input_ids"], torch.tensor(pair["forget"]["labels"][1:])
        at = (labels != -100).nonzero()[:, 0]
        scores = torch.log_softmax(logits(ids, 1.0) / temperature, -1)[at, labels[at]]
        if options.get("memorization_loss") == "npo":
            reference = torch.log_softmax(logits(ids, 0.0) / temperature, -1)[at, labels[at]].detach()
            memorization += 2 / beta * torch.log(torch.sigmoid(-beta * (scores.sum() - reference.sum())))
        else:
            memorization -= scores.sum()
        num_forget += len(at)
        for row in pair["retain"]:
            ids, labels = row["input_ids"], torch.tensor(row["labels"][1:])
            at = labels != -100
            reference = torch.log_softmax(logits(ids, 0.0)[at], -1).detach()
            side = (
                -1 if options.get("retain_kl_both_signs") and (row["number"] + trainer.train_dataset.epoch) % 2 else 1
            )
            model_side = torch.log_softmax(logits(ids, side * scale)[at], -1)
            kl += (reference.exp() * (reference - model_side)).sum()
            nll -= model_side.gather(1, labels[at][:, None]).sum()
            num_retain += int(at.sum())
    weights = trainer.args.retain_kl_weight, trainer.args.retain_nll_weight
    loss = memorization / num_forget + (weights[0] * kl + weights[1] * nll) / num_retain
    loss.backward()
    means = {"memorization_loss": memorization / num_forget, "retain_kl": kl / num_retain, "loss": loss}
    return {name: leaf.grad for name, leaf in leaves.items()}, {name: mean.item() for name, mean in means.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "paper"},
        {"preset": "paper", "retain_kl_weight": 3.0},
        {"retain_kl_scale": -0.5, "memorization_temperature": 2.0},
        {"memorization_loss": "npo"},
        {"retain_per_forget": 2},
        {"retain_nll_weight": 2.0},
        {"gradient_checkpointing": False},
        {"retain_kl_both_signs": True, "retain_kl_scale": 2.0, "retain_per_forget": 2},
        {"model": tiny_opt},
    ],
    ids=lambda options: (
        ",".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()) or "defaults"
    ),
)
def test_gradients_equal_brute_force(tmp_path, options):
    recorder = GradientRecorder()
    trainer = make_trainer(tmp_path, batch_size=2, accumulation=2, callbacks=[recorder], **options)
    order = []
    original = trainer.train_dataset.__class__.__getitem__
    trainer.train_dataset.__class__.__getitem__ = lambda self, index: (order.append(index), original(self, index))[1]
    try:
        trainer.train()
    finally:
        trainer.train_dataset.__class__.__getitem__ = original

    assert sorted(order) == list(range(7))
    windows = [order[:4], order[4:]]  # two micro-batches of two, then a partial window of two and one
    losses = [log for log in trainer.state.log_history if "memorization_loss" in log]
    for step, window in enumerate(windows):
        expected, means = brute_force(trainer, recorder.weights[step], window, **options)
        assert_close(recorder.gradients[step], expected)
        for name, mean in means.items():
            assert losses[step][name] == pytest.approx(mean, rel=1e-5), name


@pytest.mark.parametrize("options", [{}, {"retain_kl_both_signs": True}], ids=["mirror", "both signs"])
def test_one_forward_with_gradients_a_batch(tmp_path, options):
    trainer = make_trainer(tmp_path, batch_size=4, gradient_checkpointing=False, **options)
    with_gradients = []
    trainer.base_model.get_input_embeddings().register_forward_hook(
        lambda *_: with_gradients.append(torch.is_grad_enabled())
    )
    trainer.train()
    assert trainer.state.global_step == sum(with_gradients) == 2


def test_retain_kl_starts_at_zero(tmp_path):
    trainer = make_trainer(tmp_path, random_b=False)
    trainer.train()
    first, second = (log["retain_kl"] for log in trainer.state.log_history if "retain_kl" in log)
    assert abs(first) < 1e-6
    assert second > 1e-6


def test_accumulation_equals_one_large_batch(tmp_path):
    results = {}
    for batch_size, accumulation in ((4, 1), (1, 4), (2, 2)):
        recorder = GradientRecorder()
        trainer = make_trainer(tmp_path, batch_size=batch_size, accumulation=accumulation, callbacks=[recorder])
        trainer.train()
        assert trainer.state.global_step == 2  # four rows, then a last partial window of three
        results[batch_size] = recorder
    for batch_size in (1, 2):
        for step in range(2):
            assert_close(results[batch_size].gradients[step], results[4].gradients[step])


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_one_seed_one_result(tmp_path):
    adapters = []
    for run in ("a", "b"):
        trainer = make_trainer(tmp_path / run, num_train_epochs=3, random_b=False)
        trainer.train()
        adapters.append(adapter_of(trainer))
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    other = make_trainer(tmp_path / "c", num_train_epochs=3, random_b=False, seed=1)
    other.train()
    assert any(not torch.equal(adapters[0][name], value) for name, value in adapter_of(other).items())


@pytest.mark.parametrize("stop_at", [2, 3], ids=["between epochs", "inside an epoch"])
def test_resumed_run_equals_straight_run(tmp_path, stop_at):
    options = {"num_train_epochs": 3, "random_b": False, "save_strategy": "steps", "save_steps": stop_at}
    straight = make_trainer(tmp_path / "straight", **options)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop_at

    make_trainer(tmp_path / "stopped", callbacks=[Stop()], **options).train()
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)

    expected = adapter_of(straight)
    assert all(torch.equal(value, expected[name]) for name, value in adapter_of(resumed).items())
    keys = ("loss", "memorization_loss", "retain_kl", "num_tokens", "step")
    logs = [
        [{key: log[key] for key in keys} for log in trainer.state.log_history if "retain_kl" in log]
        for trainer in (straight, resumed)
    ]
    assert logs[0] == logs[1]
