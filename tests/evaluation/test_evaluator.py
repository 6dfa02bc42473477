"""The evaluator against a model merged by hand in fp64, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import zlib

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn import UnlearningError
from hf_unlearn.data import load_rows, to_prompt_completion
from hf_unlearn.evaluation import Evaluation, EvaluationSet, Evaluator, Figure, Protocol, custom_protocol


EOS = 2
ALPHA = 1.5
TOKENIZER = tiny_tokenizer()


def tiny_adapter(std: float = 0.1):
    """A tiny Llama with an adapter that changes it much."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def merge_by_hand(model, alpha: float):
    merged = tiny_llama().double().eval()
    for name, module in merged.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            lora = model.get_submodule(f"base_model.model.{name}")
            product = lora.lora_B["default"].weight.double() @ lora.lora_A["default"].weight.double()
            module.weight.data -= alpha * (8 / 4) * product
    return merged


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@torch.no_grad()
def score(model, prompt: str, answer: str) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities over the vocabulary at each answer position, and the answer tokens."""
    target = [*ids_of(answer), EOS]
    logits = model(torch.tensor([ids_of(prompt) + target])).logits[0, -len(target) - 1 : -1]
    return logits.log_softmax(-1), target


@torch.no_grad()
def answer(model, prompt: str, max_new_tokens: int) -> str:
    ids = ids_of(prompt)
    for _ in range(max_new_tokens):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == EOS:
            break
    return TOKENIZER.decode(ids[len(ids_of(prompt)) :], skip_special_tokens=True).strip()


def make_sets() -> dict[str, list[dict]]:
    """Half of the forget answers are what the reference itself would say, so that some is memorised."""
    sets = {name: tiny_rows(4, seed) for seed, name in enumerate(("forget", "retain", "holdout"))}
    base = tiny_llama().eval()
    for row in sets["forget"][:2]:
        row["completion"] = " " + answer(base, row["prompt"], 6)
    for index, row in enumerate(sets["forget"]):
        row["paraphrased_answer"] = f" w{20 + index} w9"
        row["wrong_answers"] = [f" w{30 + index} w8 w7", f" w{40 + index}"]
    return sets


SETS = make_sets()


def protocol(**changes) -> Protocol:
    sets = {name: load_rows(changes.get(name, rows)) for name, rows in SETS.items()}
    return custom_protocol(sets, chat=False, max_new_tokens=4)


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(tiny_adapter(), TOKENIZER, protocol(), progress=False)


def count_forwards(model) -> list[int]:
    """Grows by one entry, the number of tokens, at each forward pass."""
    counts = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: counts.append(args[0].numel()))
    return counts


def scales_of(model) -> set[float]:
    return {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)}


class TestAgainstAModelMergedByHand:
    @pytest.fixture(scope="class")
    def merged(self, evaluator):
        return merge_by_hand(evaluator.model, ALPHA)

    @pytest.fixture(scope="class")
    def evaluation(self, evaluator):
        return evaluator.evaluate(ALPHA)

    @pytest.mark.parametrize("name", SETS)
    def test_columns(self, evaluation, merged, name):
        columns = evaluation.rows[name]
        assert columns["row"] == [0, 1, 2, 3]
        for index, row in enumerate(SETS[name]):
            log_probs, target = score(merged, row["prompt"], row["completion"])
            of_target = log_probs[range(len(target)), target].numpy()
            right = (log_probs.argmax(-1) == torch.tensor(target)).tolist()[:-1]
            misses = [position + 1 for position, hit in enumerate(right) if not hit]
            expected = {
                "num_tokens": len(target),
                "loss": -of_target.mean(),
                "probability": math.exp(of_target.mean()),
                "exact_memorization": sum(right) / len(right),
                "extraction_strength": 1 - max(misses, default=0) / len(right),
            }
            for column, value in expected.items():
                assert columns[column][index] == pytest.approx(value, rel=1e-4), column

    def test_some_rows_are_memorised_and_some_are_not(self, evaluator):
        strengths = evaluator.evaluate(0.0).rows["forget"]["extraction_strength"]
        assert strengths[:2] == [1.0, 1.0]
        assert min(strengths) < 1

    @pytest.mark.parametrize("name", ["forget", "holdout"])
    def test_membership_scores_leave_eos_out(self, evaluation, merged, name):
        columns = evaluation.rows[name]
        for index, row in enumerate(SETS[name]):
            log_probs, target = score(merged, row["prompt"], row["completion"])
            of_target = log_probs[range(len(target)), target]
            mean = (log_probs.exp() * log_probs).sum(-1)
            std = (log_probs.exp() * (log_probs - mean[:, None]) ** 2).sum(-1).sqrt()
            lowest = max(1, int(0.4 * (len(target) - 1)))
            min_k = -of_target[:-1].sort().values[:lowest].mean()
            plus_plus = -((of_target - mean) / std)[:-1].sort().values[:lowest].mean()
            text = row["completion"].strip().encode()
            assert columns["zlib_score"][index] == pytest.approx(-of_target.mean().item() / len(zlib.compress(text)))
            assert columns["min_k_score"][index] == pytest.approx(min_k.item(), rel=1e-4)
            assert columns["min_k_plus_plus_score"][index] == pytest.approx(plus_plus.item(), rel=1e-4)

    def test_truth_ratios(self, evaluation, merged):
        columns = evaluation.rows["forget"]
        for index, row in enumerate(SETS["forget"]):

            def loss(text, prompt=row["prompt"]):
                log_probs, target = score(merged, prompt, text)
                return -log_probs[range(len(target)), target].mean().item()

            wrong = [loss(text) for text in row["wrong_answers"]]
            right = loss(row["paraphrased_answer"])
            assert columns["wrong_losses"][index] == pytest.approx(wrong, rel=1e-4)
            assert columns["paraphrased_loss"][index] == pytest.approx(right, rel=1e-4)
            assert columns["truth_ratio"][index] == pytest.approx(math.exp(right - np.mean(wrong)), rel=1e-3)
        assert "truth_ratio" not in evaluation.rows["retain"]

    def test_kl_to_the_model_without_its_adapter(self, evaluation, merged):
        before = tiny_llama().double().eval()
        for index, row in enumerate(SETS["retain"]):
            after, was = (score(model, row["prompt"], row["completion"])[0] for model in (merged, before))
            expected = (was.exp() * (was - after)).sum(-1).mean().item()
            assert evaluation.rows["retain"]["kl"][index] == pytest.approx(expected, rel=1e-3)

    def test_answers(self, evaluation, merged):
        for name in ("forget", "retain"):
            expected = [answer(merged, row["prompt"], 4) for row in SETS[name]]
            assert evaluation.answers[name] == expected
            assert evaluation.rows[name]["ground_truth"] == [row["completion"].strip() for row in SETS[name]]
        assert "holdout" not in evaluation.answers

    def test_figures(self, evaluation):
        rows = evaluation.rows
        assert (evaluation.protocol, evaluation.alpha) == ("custom", ALPHA)
        for name in SETS:
            assert evaluation.value(f"{name}_probability") == pytest.approx(np.mean(rows[name]["probability"]))
        pairs = [(a, b) for a in rows["forget"]["loss"] for b in rows["holdout"]["loss"]]
        assert evaluation.value("membership_auc_loss") == pytest.approx(np.mean([a < b for a, b in pairs]))
        assert evaluation.figures["forget_quality"].note == "not computed: no retrained log"

    def test_another_batch_size_gives_the_same(self, evaluation, evaluator):
        other = Evaluator(evaluator.model, TOKENIZER, protocol(), batch_size=1, progress=False).evaluate(ALPHA)
        assert other.answers == evaluation.answers
        for name in SETS:
            assert other.rows[name]["loss"] == pytest.approx(evaluation.rows[name]["loss"], abs=1e-5)


class TestAlphas:
    def test_alpha_0_is_the_reference(self, evaluator):
        base = Evaluator(tiny_llama(), TOKENIZER, protocol(), progress=False).evaluate()
        evaluation = evaluator.evaluate(0.0)
        assert base.alpha is None
        assert evaluation.rows["forget"]["loss"] == pytest.approx(base.rows["forget"]["loss"], abs=1e-5)
        assert evaluation.rows["retain"]["kl"] == pytest.approx([0.0] * 4, abs=1e-6)
        assert base.figures["retain_kl"].note == "not computed: no reference model"

    def test_no_alpha_is_the_model_as_it_stands(self, evaluator):
        memorising = merge_by_hand(evaluator.model, -1.0)
        expected = score(memorising, SETS["forget"][3]["prompt"], SETS["forget"][3]["completion"])
        losses = evaluator.evaluate(generate=False).rows["forget"]["loss"]
        assert losses[3] == pytest.approx(-expected[0][range(len(expected[1])), expected[1]].mean().item(), rel=1e-4)

    def test_the_scale_of_the_adapter_and_the_mode_come_back(self):
        model = tiny_adapter().train()
        Evaluator(model, TOKENIZER, protocol(), progress=False).evaluate(3.0)
        assert model.training
        assert scales_of(model) == {8 / 4}

    def test_run_evaluates_the_reference_and_the_grid_by_rising_alpha(self, evaluator):
        assert [one.alpha for one in evaluator.run([2, 0.5, 2.0], generate=False)] == [0.0, 0.5, 2.0]

    def test_alpha_without_an_adapter(self):
        evaluator = Evaluator(tiny_llama(), TOKENIZER, protocol(), progress=False)
        with pytest.raises(UnlearningError, match=r"α = 1 needs an adapter.*PeftModel"):
            evaluator.evaluate(1.0)

    def test_everything_is_computed_once(self):
        model = tiny_adapter()
        evaluator, forwards = Evaluator(model, TOKENIZER, protocol(), progress=False), count_forwards(model)
        scored = evaluator.evaluate(1.0, generate=False)
        assert not scored.answers
        assert "rouge_l_recall" not in scored.rows["forget"]
        num_scored = len(forwards)
        both = evaluator.evaluate(1.0)
        assert evaluator.evaluate(1.0, generate=False) is scored
        assert evaluator.evaluate(1.0) is both
        assert evaluator.evaluated() == [both]
        assert both.rows["forget"]["loss"] is scored.rows["forget"]["loss"]
        fresh = Evaluator(model, TOKENIZER, protocol(), progress=False)
        forwards_of_both = len(forwards)
        fresh.evaluate(1.0)
        assert len(forwards) - forwards_of_both == forwards_of_both  # scoring first and answering later costs no more
        assert 0 < num_scored < forwards_of_both

    def test_evaluated_gives_answers_where_there_are_any(self):
        evaluator = Evaluator(tiny_adapter(), TOKENIZER, protocol(), progress=False)
        evaluator.evaluate(1.0, generate=False)
        evaluator.evaluate(0.5)
        evaluator.evaluate(0.0, generate=False)
        assert [(one.alpha, bool(one.answers)) for one in evaluator.evaluated()] == [
            (0.0, False),
            (0.5, True),
            (1.0, False),
        ]

    def test_benchmarks_see_the_model_at_alpha_and_run_once(self):
        scales = []

        def benchmarks(model, tokenizer):
            scales.extend(scales_of(model))
            return {"harness_accuracy": Figure(0.25, 4)}

        evaluator = Evaluator(
            tiny_adapter(), TOKENIZER, dataclasses.replace(protocol(), benchmarks=benchmarks), progress=False
        )
        evaluator.evaluate(1.0, generate=False)
        assert evaluator.evaluate(1.0).value("harness_accuracy") == 0.25
        assert scales == [-2.0]


def test_kl_to_a_reference_model_that_is_in_training_mode():
    reference = tiny_llama(seed=1, attention_dropout=0.5).train()
    evaluator = Evaluator(tiny_llama(), TOKENIZER, protocol(), reference_model=reference, progress=False)
    columns = evaluator.evaluate(generate=False).rows["retain"]
    assert reference.training
    after, before = tiny_llama().double().eval(), tiny_llama(seed=1).double().eval()
    for index, row in enumerate(SETS["retain"]):
        log_probs, was = (score(model, row["prompt"], row["completion"])[0] for model in (after, before))
        assert columns["kl"][index] == pytest.approx((was.exp() * (was - log_probs)).sum(-1).mean().item(), rel=1e-4)


def test_variables_of_the_chat_template_reach_both_passes():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ day }}{% for message in messages %} {{ message.content }}"
        "{% if message.role == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    )
    rows = load_rows([{"question": "w5 w6", "answer": "w7"}])
    content = EvaluationSet(to_prompt_completion(rows, name="set", chat=True), ("probability", "rouge"), 2)
    one_set = Protocol("one", {"forget": content}, lambda evaluation, retrained: {}, "")
    evaluation = Evaluator(
        tiny_llama(), tokenizer, one_set, chat_template_kwargs={"day": "w9"}, progress=False
    ).evaluate()
    model = tiny_llama().double().eval()
    log_probs, target = score(model, "w9 w5 w6", "w7")
    assert evaluation.rows["forget"]["loss"] == pytest.approx([-log_probs[[0, 1], target].mean().item()], rel=1e-4)
    assert evaluation.answers["forget"] == [answer(model, "w9 w5 w6", 2)]


class TestRefusals:
    def check(self, match: str, content: Protocol, tokenizer=TOKENIZER, **options) -> None:
        with pytest.raises(UnlearningError, match=match):
            Evaluator(tiny_llama(), tokenizer, content, progress=False, **options).evaluate(generate=False)

    @pytest.mark.parametrize("empty", ["", "  ", None])
    def test_an_empty_answer(self, empty):
        rows = [dict(row) for row in SETS["retain"]]
        rows[2]["completion"] = empty
        self.check(r"retain set, row 2: an answer is empty", protocol(retain=rows))

    def test_rows_without_wrong_answers(self):
        rows = [dict(row) for row in SETS["forget"]]
        rows[3]["wrong_answers"] = None
        self.check(r"forget set, row 3: it has no wrong answers", protocol(forget=rows))

    def test_a_missing_paraphrased_answer(self):
        rows = [dict(row) for row in SETS["forget"]]
        rows[1]["paraphrased_answer"] = None
        self.check(r"forget set, row 1: an answer is empty", protocol(forget=rows))

    @pytest.mark.parametrize(("max_length", "fails"), [(3, True), (4, False)])
    def test_an_answer_that_max_length_cuts_off_whole(self, max_length, fails):
        rows = to_prompt_completion(
            load_rows([{"prompt": "w5", "completion": " w6"}, {"prompt": "w5 w6 w7", "completion": " w8"}]),
            name="set",
            chat=False,
        )
        content = EvaluationSet(rows, ("probability",), max_length=max_length)
        one_set = Protocol("one", {"retain": content}, lambda evaluation, retrained: {}, "")
        if fails:
            self.check(r"retain set, row 1: no token of the answer is within 3 tokens.*max_length", one_set)
        else:
            columns = Evaluator(tiny_llama(), TOKENIZER, one_set, progress=False).evaluate().rows["retain"]
            assert columns["num_tokens"] == [2, 1]  # of the second, EOS is cut

    def test_a_set_without_rows(self):
        empty = dataclasses.replace(protocol().sets["retain"], rows=protocol().sets["retain"].rows.select([]))
        content = protocol()
        self.check("retain set has no rows", dataclasses.replace(content, sets=content.sets | {"retain": empty}))

    def test_a_tokenizer_whose_ids_the_model_does_not_have(self):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["w99"])
        rows = [dict(SETS["retain"][0]), {"prompt": "w5", "completion": " w99"}]
        self.check("that of another model: its ids go up to 64.*64 ids", protocol(retain=rows), tokenizer)

    def test_a_tokenizer_whose_special_tokens_do_not_end_a_text(self):
        with pytest.raises(UnlearningError, match=r"another model.*ends a text with \[7\]"):
            Evaluator(tiny_llama(eos_token_id=7), TOKENIZER, protocol())

    def test_a_retrained_log_of_other_rows(self):
        log = Evaluator(tiny_llama(seed=1), TOKENIZER, protocol(), progress=False).evaluate(generate=False)
        columns = {column: values[:3] for column, values in log.rows["forget"].items()}
        shorter = Evaluation("custom", rows={**log.rows, "forget": columns})
        self.check("forget set: 4 rows were evaluated, and the retrained log has 3", protocol(), retrained=shorter)
        other = {**log.rows["forget"], "ground_truth": ["w4"] * 4}
        other = Evaluation("custom", rows={**log.rows, "forget": other})
        self.check("forget set, row 0: the answer is", protocol(), retrained=other)
        evaluator = Evaluator(tiny_llama(), TOKENIZER, protocol(), retrained=log, progress=False)
        assert 0 <= evaluator.evaluate(generate=False).value("forget_quality") <= 1
