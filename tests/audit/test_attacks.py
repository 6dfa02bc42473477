"""What each attack puts to the model, and what it reads from it: against brute force in fp64 and known tokens."""

from __future__ import annotations

import copy
import math

import datasets
import pytest
import torch
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.audit import AuditOptions, make_case, plan_audit, relearning
from hf_unlearn.audit.case import Row
from hf_unlearn.audit.prefix import Prefix, split_answer
from hf_unlearn.audit.prompts import FewShot, Paraphrase, SystemPrompt, takes_system_turn, with_examples
from hf_unlearn.audit.quantisation import Quantisation, eight_bits
from hf_unlearn.audit.relearning import Relearning, watched
from hf_unlearn.audit.weights import linear_weights
from hf_unlearn.errors import UnlearningError


# `w60` opens a user turn, `w61` an assistant turn, `w62` a system turn; `</s>` ends each.
TEMPLATE = (
    "{% for turn in messages %}"
    "{{ {'user': 'w60', 'assistant': 'w61', 'system': 'w62'}[turn['role']] }} {{ turn['content'] }} </s> "
    "{% endfor %}{% if add_generation_prompt %}w61 {% endif %}"
)
WITHOUT_SYSTEM = TEMPLATE.replace(
    "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
)
DROPS_SYSTEM = TEMPLATE.replace("in messages %}", "in messages if turn['role'] != 'system' %}", 1)
SETS = {name: tiny_rows(6, seed) for seed, name in enumerate(("forget", "retain", "holdout"))}


def chat_tokenizer(template: str = TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def question(prompt: str, answer: str, **more) -> dict:
    return {"question": prompt, "answer": answer, **more}


def case_of(sets=SETS, tokenizer=None, model=None, **options):
    options = AuditOptions(**{"max_new_tokens": 6} | options)
    return make_case(tokenizer or tiny_tokenizer(), sets, options, model=model or tiny_llama())


def token(word: str) -> int:
    return int(word.removeprefix("w"))


def token_probabilities(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Softmax in fp64 of a model in fp64, a token at a time."""
    exact = copy.deepcopy(model).double().eval()
    found = []
    with torch.no_grad():
        for place, target in enumerate(answer):
            logits = exact(input_ids=torch.tensor([prompt + answer[:place]])).logits[0, -1]
            found.append(torch.softmax(logits, -1)[target])
    return torch.stack(found)


def geometric_mean(probabilities: torch.Tensor) -> float:
    return float(probabilities.log().mean().exp())


def test_asked_as_it_is():
    case = case_of()
    for place, row in enumerate(SETS["forget"]):
        prompt, answer = (list(map(token, row[part].split())) for part in ("prompt", "completion"))
        each = token_probabilities(case.model, prompt, [*answer, 2])
        values = {name: column[place] for name, column in case.asked["forget"].values.items()}
        assert values["probability"] == pytest.approx(geometric_mean(each), rel=1e-4)
        assert values["loss"] == pytest.approx(-math.log(values["probability"]), rel=1e-6)
        lowest = sorted((-each[:-1].log()).tolist())[::-1][: max(1, int(0.4 * len(answer)))]
        assert values["min_k"] == pytest.approx(sum(lowest) / len(lowest), rel=1e-4)
    assert case.asked["retain"].answers is None and len(case.asked["holdout"].answers) == 6


# ---- Prefix ----


@pytest.mark.parametrize(
    ("share", "given", "rest"),
    [(0.25, [10], [11, 12, 13, 14]), (0.5, [10, 11], [12, 13, 14]), (0.1, [10], [11, 12, 13, 14])],
)
def test_split(share, given, rest):
    split = split_answer([7, 8], [10, 11, 12, 13, 14, 2], 1, share)
    assert (split.prompt, split.given, split.rest) == ([7, 8, *given], len(given), rest)


def test_split_of_short_answers():
    assert split_answer([7], [10, 2], 1, 0.5) is None
    assert split_answer([7], [10, 11, 2], 1, 0.9).rest == [11]  # something is always left


def test_prefix_against_brute_force():
    rows = [
        {"prompt": "w7 w8", "completion": " w10 w11 w12 w13 w14"},
        {"prompt": "w9", "completion": " w20"},
        {"prompt": "w5", "completion": " w30 w31"},
    ]
    case = case_of({"forget": rows, "retain": rows})
    quarter, half = Prefix().measure(case)
    assert (quarter.variant, half.variant) == ("first 25 % given", "first 50 % given")
    assert quarter.positions == half.positions == [0, 2]
    expected = geometric_mean(token_probabilities(case.model, [7, 8], [10, 11, 12, 13, 14, 2])[2:])
    assert half.values["probability"][0] == pytest.approx(expected, rel=1e-4)
    ids = torch.tensor([[7, 8, 10, 11]])
    with torch.no_grad():
        greedy = case.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert half.answers[0] == case.tokenizer.decode(greedy[0, 4:], skip_special_tokens=True)
    assert Prefix().notes(case) == ["1 of 3 forget rows have an answer of one token and are left out."]
    before = case.asked["forget"].answers[0].split()
    found = [word for word in ("w12", "w13", "w14") if word in before]
    assert Prefix().own_reference(case, half, "rouge_l_recall")[0] == pytest.approx(len(found) / 3, abs=0.34)
    assert Prefix().own_reference(case, half, "probability") is None


# ---- Prompts ----


def row(prompt, completion) -> Row:
    return Row(prompt, completion, completion if isinstance(completion, str) else completion[0]["content"], None)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_examples_as_turns():
    asked = row([turn("system", "S"), turn("user", "q")], [turn("assistant", "a")])
    example = row([turn("system", "other"), turn("user", "q1")], [turn("assistant", "a1")])
    expected = [turn("system", "S"), turn("user", "q1"), turn("assistant", "a1"), turn("user", "q")]
    assert with_examples(asked, [example]) == expected


def test_examples_as_text():
    examples = [row("Q: one\nA:", " 1"), row("Q: two\nA:", " 2")]
    assert with_examples(row("Q: three\nA:", " 3"), examples) == "Q: one\nA: 1\n\nQ: two\nA: 2\n\nQ: three\nA:"


def test_examples_never_show_the_answer():
    rows = [question(f"w{n} w4", "w20" if n < 7 else f"w{n}") for n in range(5, 12)]
    case = case_of({"forget": rows, "retain": rows, "holdout": [question("w40", "w41")]}, chat_tokenizer(), few_shot=9)
    prompts = FewShot().prompts(case, "forget")
    for place, prompt in prompts.items():
        answers = [each["content"] for each in prompt if each["role"] == "assistant"]
        assert rows[place]["answer"] not in answers
        assert len(answers) == len(rows) - (2 if place < 2 else 1)
    shown = {each["content"] for each in FewShot().prompts(case, "holdout")[0] if each["role"] == "assistant"}
    assert shown == {each["answer"] for each in rows}


def test_few_shot_needs_another_row():
    case = case_of({"forget": SETS["forget"][:1], "retain": SETS["retain"]})
    assert "no other forget row" in FewShot().obstacle(case)
    case = case_of({"forget": [{"text": "w5 w6"}, {"text": "w7 w8"}], "retain": SETS["retain"]})
    assert "without questions" in FewShot().obstacle(case)


def test_rows_that_do_not_fit_are_left_out():
    rows = [{"prompt": f"w{n}", "completion": f" w{n + 1}" + " w5" * (10 if n == 10 else 1)} for n in range(10, 14)]
    case = case_of({"forget": rows, "retain": rows}, few_shot=1, max_length=12)
    with pytest.warns(UserWarning, match="rows do not fit into 12 tokens"):
        found = FewShot().measure(case)[-1]
    assert 0 not in found.positions and found.positions


def test_which_templates_take_a_system_turn():
    assert takes_system_turn(chat_tokenizer())
    assert not takes_system_turn(chat_tokenizer(WITHOUT_SYSTEM))
    assert not takes_system_turn(chat_tokenizer(DROPS_SYSTEM))


def test_the_system_turn_is_what_the_model_reads():
    rows = [question("w10 w11", "w20 w21"), question("w12", "w22")]
    case = case_of({"forget": rows, "retain": rows}, chat_tokenizer(), system_prompt="w33 w34")
    found = SystemPrompt().measure(case)[-1]
    prompt = [62, 33, 34, 2, 60, 10, 11, 2, 61]
    expected = geometric_mean(token_probabilities(case.model, prompt, [20, 21, 2]))
    assert found.values["probability"][0] == pytest.approx(expected, rel=1e-4)
    assert "no conversations" in SystemPrompt().obstacle(case_of())
    without = case_of({"forget": rows, "retain": rows}, chat_tokenizer(WITHOUT_SYSTEM))
    assert "takes no system turn" in SystemPrompt().obstacle(without)


def test_paraphrases_by_their_column():
    rows = [question("w10", "w20 w21", other="w30 w31"), question("w12", "w22", other=None)]
    sets = {"forget": rows, "retain": SETS["retain"], "holdout": [question("w13", "w23"), question("w14", "w24")]}
    options, tokenizer, model = AuditOptions(max_new_tokens=4), tiny_tokenizer(), tiny_llama()
    tokenizer.chat_template = chat_tokenizer().chat_template
    sets["retain"] = [question(each["prompt"], each["completion"]) for each in SETS["retain"]]
    case = make_case(tokenizer, sets, options, model=model, paraphrased_questions="other")
    found = Paraphrase().measure(case)[-1]
    assert (found.set, found.variant, found.positions) == ("forget", "other words", [0])
    expected = geometric_mean(token_probabilities(model, [60, 30, 31, 2, 61], [20, 21, 2]))
    assert found.values["probability"] == [pytest.approx(expected, rel=1e-4)]
    assert len(Paraphrase().notes(case)) == 2
    with pytest.raises(UnlearningError, match="'nowhere'.*question, answer.*--paraphrased_questions"):
        make_case(tokenizer, sets, options, paraphrased_questions="nowhere")


# ---- Weights ----


def test_quantised_figures_are_those_of_a_quantised_copy():
    case = case_of()
    found = {(each.variant, each.set): each for each in Quantisation().measure(case)}
    rounded = tiny_llama()
    with torch.no_grad():
        for name in linear_weights(rounded):
            rounded.get_parameter(name).copy_(eight_bits(rounded.get_parameter(name)))
    other = case_of(model=rounded)
    for name in ("forget", "retain", "holdout"):
        for measure, values in found["8 bits", name].values.items():
            assert values == other.asked[name].values[measure]
    assert found["8 bits", "forget"].answers == other.asked["forget"].answers
    assert found["8 bits", "forget"].values["probability"] != case.asked["forget"].values["probability"]


def test_watched_steps():
    assert watched(10) == [0, 1, 2, 5, 10]
    assert watched(3) == [0, 1, 2, 3]
    assert watched(1) == [0, 1]


def test_relearning_watches_rows_it_does_not_train_on():
    """All forget rows have the same answer, so what is learned of two comes back for the others."""
    rows = [{"prompt": f"w4 w{n}", "completion": " w50 w51 w52"} for n in range(20, 28)]
    case = case_of(SETS | {"forget": rows}, relearn_steps=5, relearn_learning_rate=1e-2)
    attack = Relearning()
    trained = attack.trained(case)
    assert len(trained) == 2
    found = attack.measure(case)
    curves = {name: [each for each in found if each.set == name] for name in ("forget", "trained on", "retain")}
    assert [each.x for each in curves["forget"]] == [0, 1, 2, 5]
    assert all(set(each.positions) == set(range(8)) - set(trained) for each in curves["forget"])
    start = curves["forget"][0].values["probability"]
    assert start == case.asked["forget"].at("probability", curves["forget"][0].positions)
    assert curves["trained on"][-1].figure("probability").value > 0.5
    assert curves["forget"][-1].figure("probability").value > 0.5
    assert curves["retain"][-1].figure("probability").value < 0.2


def test_one_step_of_relearning_by_hand():
    """The first step of AdamW moves B by the learning rate against the sign of its gradient, and leaves A."""
    rows = tiny_rows(2, 5)
    options = {"relearn_steps": 1, "relearn_share": 0.5, "relearn_learning_rate": 1e-3, "relearn_rank": 4}
    case = case_of({"forget": rows, "retain": rows}, **options)
    seen = []
    with relearning.untouched(case.model):
        relearning.train(case, [0], lambda step: seen.append({n: p.clone() for n, p in case.model.named_parameters()}))
    (weights,) = seen
    factors = {name: weight for name, weight in weights.items() if "lora_B" in name}
    assert len(factors) == 14
    moved = torch.cat([weight.detach().abs().flatten() for weight in factors.values()])
    assert (moved > 0).float().mean() > 0.9 and moved.max() == pytest.approx(1e-3, rel=1e-3)


def test_a_plan_needs_no_weights():
    rows = datasets.Dataset.from_list(SETS["forget"])
    case = make_case(tiny_tokenizer(), {"forget": rows, "retain": rows}, AuditOptions())
    plans = plan_audit(case)
    assert list(plans)[:2] == ["direct", "relearning"]
    assert plans["relearning"].startswith(
        "train 10 steps on 1 of 6 forget rows, and watch the others at steps 0, 1, 2, 5, 10"
    )
    assert plans["membership"] == "not run: it compares with hold-out rows, and there are none"
    assert "--base" in plans["reverse"] and plans["reverse"].startswith("not run")
    assert plans["prefix"] == "give the first 25 % and 50 % of each answer"
    assert plans["system_prompt"].startswith("not run")
