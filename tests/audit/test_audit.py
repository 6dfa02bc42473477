"""The whole audit on a tiny model: the weights are untouched, verdicts come by the right reference, errors name things."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.audit import ATTACKS, AuditOptions, audit, write_audit
from hf_unlearn.audit.case import Case
from hf_unlearn.data.tokenization import encode_pair
from hf_unlearn.errors import UnlearningError


SETS = {name: tiny_rows(5, seed, longest=9) for seed, name in enumerate(("forget", "retain", "holdout"))}
QUICK = AuditOptions(attacks=("prefix",), max_new_tokens=4)


def digest(model) -> str:
    """SHA-256 of all parameters and buffers, bit by bit."""
    found = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        found.update(name.encode() + tensor.detach().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def run(model=None, options=QUICK, sets=SETS, **more):
    return audit(
        model if model is not None else tiny_llama(),
        tiny_tokenizer(),
        sets["forget"],
        sets["retain"],
        **{"holdout": sets.get("holdout"), "options": options} | more,
    )


@pytest.fixture(scope="module")
def whole():
    """All attacks on a model, with what it was before and is after."""
    model, base = tiny_llama(), tiny_llama(seed=3)
    model.train()

    def state():
        flags = [parameter.requires_grad for parameter in model.parameters()]
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        return digest(model), flags, modules, set(model.__dict__), model.config.to_dict()

    before = state()
    options = AuditOptions(max_new_tokens=4, relearn_steps=2, relearn_learning_rate=1e-2)
    titles: list[str] = []
    found = run(model, options, base=base, alpha=0.5, on_start=titles.append)
    return found, before, state(), titles, digest(base)


def test_the_model_is_what_it_was(whole):
    _, before, after, _, base = whole
    assert before == after
    assert base == digest(tiny_llama(seed=3))


def test_every_attack_is_reported(whole):
    found, *_, titles, _ = whole
    assert list(found.findings) == ["direct", *ATTACKS]
    assert len(titles) == len(ATTACKS) + 1
    run_ = {name for name, finding in found.findings.items() if finding.verdict != "not run"}
    assert set(found.findings) - run_ == {"paraphrase", "system_prompt"}
    for name in run_:
        assert found.findings[name].rule and found.findings[name].comparisons


def test_steps_back_with_a_known_alpha(whole):
    """t = 1/α is the memorising model."""
    finding = whole[0].findings["reverse"]
    assert {each.x for each in finding.measurements} == {0.0, 0.5, 1.0, 2.0}
    assert {each.against for each in finding.comparisons} == {"the base"}
    assert "1/α = 2" in finding.notes[0]
    base = run(tiny_llama(seed=3)).findings["direct"].measurements[0]
    of_base = next(each for each in finding.measurements if each.set == "forget" and each.x == 0)
    assert of_base.values["probability"] == pytest.approx(base.values["probability"], rel=1e-6)


def test_json_holds_every_figure(whole, tmp_path):
    found = whole[0]
    page, file = write_audit(tmp_path / "new", found)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["sets"] == {"forget": 5, "retain": 5, "holdout": 5}
    assert list(content["attacks"]) == list(found.findings)
    assert content["attacks"]["paraphrase"]["verdict"] == "not run"
    figure = content["attacks"]["direct"]["figures"][0]
    values = found.findings["direct"].measurements[0].values["probability"]
    assert (figure["set"], figure["measure"], figure["n"]) == ("forget", "probability", 5)
    assert figure["value"] == pytest.approx(sum(values) / 5) and figure["low"] <= figure["value"] <= figure["high"]
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_model_is_what_it_was_after_a_failure(monkeypatch):
    """An attack fails in the middle of the training: no adapter, no changed weight is left."""
    model = tiny_llama()
    before, modules = digest(model), [type(module) for module in model.modules()]
    ask = Case.ask

    def failing(self, variant, *arguments, **options):
        if variant == "1 step":
            raise RuntimeError("the disk is full")
        return ask(self, variant, *arguments, **options)

    monkeypatch.setattr(Case, "ask", failing)
    with pytest.raises(RuntimeError, match="the disk is full"):
        run(model, AuditOptions(attacks=("relearning",), max_new_tokens=4))
    assert (digest(model), [type(module) for module in model.modules()]) == (before, modules)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_in_bfloat16_is_what_it_was():
    model, base = tiny_llama().bfloat16(), tiny_llama(seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = AuditOptions(attacks=("relearning", "quantisation", "reverse"), relearn_steps=1, max_new_tokens=4)
    found = run(model, options, base=base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(found.findings[name].measurements for name in ("relearning", "quantisation", "reverse"))


def learned(rows, steps: int = 40):
    """A tiny model that knows rows by heart."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        for row in rows:
            pair = encode_pair(row["prompt"], row["completion"], tokenizer)
            ids, labels = (torch.tensor([pair[key]]) for key in ("input_ids", "labels"))
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def knowing():
    return learned(SETS["forget"])


def test_judged_by_holdout_rows(knowing):
    options = AuditOptions(attacks=("prefix", "membership"), max_new_tokens=8)
    findings = run(knowing, options).findings
    assert [findings[name].verdict for name in ("direct", "prefix", "membership")] == ["leaks"] * 3
    assert {each.against for each in findings["prefix"].comparisons} == {"hold-out rows"}
    assert all(each.attacked.value == 1.0 for each in findings["membership"].comparisons)
    assert "more likely than rows never seen" in findings["membership"].words


def test_judged_by_the_model_as_it_is(knowing):
    """Without hold-out rows only what an attack adds can be seen: nothing here, as the model says it all by itself."""
    options = AuditOptions(attacks=("prefix",), max_new_tokens=12)
    findings = run(knowing, options, {name: SETS[name] for name in ("forget", "retain")}).findings
    assert findings["direct"].verdict == "measured"
    assert findings["prefix"].verdict == "holds"
    assert {each.against for each in findings["prefix"].comparisons} == {"the model as it is"}
    assert {each.measure for each in findings["prefix"].comparisons} == {"rouge_l_recall"}


def test_judged_by_a_retrained_model(knowing, tmp_path):
    options = AuditOptions(attacks=("prefix", "membership"), max_new_tokens=8)
    retrained = run(tiny_llama(), options)
    assert retrained.leaks == []
    write_audit(tmp_path, retrained)
    found = run(knowing, options, retrained_audit=tmp_path).findings
    assert [found[name].verdict for name in ("direct", "prefix", "membership")] == ["leaks"] * 3
    for name in ("direct", "prefix", "membership"):
        assert {each.against for each in found[name].comparisons} == {"the retrained model"}
    theirs = retrained.findings["prefix"].comparisons[0]
    assert found["prefix"].comparisons[0].reference.value == pytest.approx(theirs.attacked.value)
    itself = run(tiny_llama(), options, retrained_audit=tmp_path).findings
    assert all(each.gain.value == 0 for name in itself for each in itself[name].comparisons)


def test_refuses_an_audit_of_other_rows(tmp_path):
    other = run(sets=SETS | {"forget": SETS["forget"][::-1]})
    with pytest.raises(UnlearningError, match="other forget rows"):
        run(retrained_audit=other.to_dict())
    with pytest.raises(UnlearningError, match="another `few_shot` and `seed`: 2, 1"):
        run(
            retrained_audit=run(
                options=AuditOptions(attacks=("prefix",), max_new_tokens=4, seed=1, few_shot=2)
            ).to_dict()
        )
    (tmp_path / "audit.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UnlearningError, match=r"is no audit\.json"):
        run(retrained_audit=tmp_path)
    with pytest.raises(UnlearningError, match=r"--retrained_audit .*nowhere"):
        run(retrained_audit=tmp_path / "nowhere")


def test_refuses_what_cannot_be_used():
    with pytest.raises(UnlearningError, match=r"--base .* does not fit.*\(64, 64\)"):
        run(base=tiny_llama(intermediate_size=64))
    with pytest.raises(UnlearningError, match="that of another model"):
        run(tiny_llama(vocab_size=32))
    blank = [*SETS["forget"], {"prompt": "w5", "completion": " "}]
    with pytest.raises(UnlearningError, match="forget set, row 5: an answer is empty"):
        run(sets=SETS | {"forget": blank})
    messages = [
        {"prompt": [{"role": "user", "content": "w5"}], "completion": [{"role": "assistant", "content": "w6"}]}
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} </s> {% endfor %}"
    with pytest.raises(UnlearningError, match="conversations and the other text"):
        audit(tiny_llama(), tokenizer, messages, SETS["retain"], holdout=SETS["holdout"])
