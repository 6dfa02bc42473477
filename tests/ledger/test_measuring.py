"""What is measured on the live sum is what the built models would give."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from ledger_adapters import ROWS, check_equal, contents, filled
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_unlearn import Ledger, UnlearningError
from hf_unlearn.requests import Measurement


def mean_loss(model, rows: list[dict]) -> tuple[float, float]:
    """Mean loss and mean answer probability by plain transformers, one row at a time."""
    tokenizer, losses = tiny_tokenizer(), []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        losses.append(
            -sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)) / len(answer)
        )
    return sum(losses) / len(losses), sum(torch.tensor(losses).neg().exp().tolist()) / len(losses)


class TestMeasure:
    def test_it_equals_built_models(self, adapters, tiny_model_dir, tmp_path):
        ledger = filled(tmp_path / "ledger", adapters, "CAB")
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        retain = tiny_rows(4, 50)
        options = {"retain_dataset": datasets.Dataset.from_list(retain), "progress": False}
        measured = ledger.measure(model, tiny_tokenizer(), **options)
        assert (measured.active, measured.newest, measured.not_measured) == (["A", "B", "C"], "B", {})
        check_equal(untouched, model.state_dict())
        models = {
            ids: AutoModelForCausalLM.from_pretrained(
                ledger.build(tmp_path / ids, only=list(ids), progress=False).output_dir
            )
            for ids in ("A", "B", "C", "AC", "ABC")
        } | {"": model}
        for id in "ABC":
            for state, ids in {"base": "", "alone": id, "before": "AC", "together": "ABC"}.items():
                found = measured.requests[id][state]
                wanted = mean_loss(models[ids], ROWS[id])
                assert (found["loss"], found["probability"]) == pytest.approx(wanted, abs=2e-5), (id, state)
        for state, ids in {"base": "", "before": "AC", "together": "ABC"}.items():
            assert measured.retain[state]["loss"] == pytest.approx(mean_loss(models[ids], retain)[0], abs=2e-5)

        record = json.loads((ledger.folder / "measurements" / "0001.json").read_text())
        assert record == measured.to_dict()
        assert Ledger.open(ledger.folder)["B"].metrics == measured.requests["B"] | {"retain": measured.retain}
        assert ledger["A"].metrics is None
        again = ledger.measure(model, tiny_tokenizer(), **options)  # the model carries no adapter any more
        assert again.requests == measured.requests and (ledger.folder / "measurements" / "0002.json").is_file()

    def test_one_request(self, adapters, tiny_model_dir, tmp_path):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        scores = ledger.measure(model, tiny_tokenizer(), progress=False).requests["A"]
        assert scores["before"] == scores["base"] != scores["alone"] == scores["together"]

    def test_what_cannot_be_measured(self, adapters, tiny_model_dir, tmp_path):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        ledger.add(adapters["B"], 1, id="B")
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, ROWS["C"])))
        ledger.add(adapters["C"], 1, id="C", forget_dataset=path)
        path.unlink()
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        measured = ledger.measure(model, tiny_tokenizer(), progress=False)
        assert measured.requests.keys() == {"A"} and measured.not_measured.keys() == {"B", "C"}
        assert "without --forget_dataset" in measured.not_measured["B"] and "rows.jsonl" in measured.not_measured["C"]
        ledger.revoke("A", "withdrawn")
        with pytest.raises(UnlearningError, match="nothing to measure"):
            ledger.measure(model, tiny_tokenizer(), progress=False)

    def test_a_model_that_overflows(self, adapters, tiny_model_dir, tmp_path):
        ledger = Ledger.open(tmp_path / "ledger", create=True)
        ledger.add(adapters["A"], 1e39, id="A", forget_dataset=ROWS["A"], keep_rows=True)
        before = contents(ledger.folder)
        with pytest.raises(UnlearningError, match="forget A rows is not finite under A"):
            ledger.measure(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tiny_tokenizer(), progress=False)
        assert contents(ledger.folder) == before

    def test_another_model(self, ledger):
        before = contents(ledger.folder)
        with pytest.raises(UnlearningError, match="not the base model"):
            ledger.measure(tiny_llama(seed=8), tiny_tokenizer(), progress=False)
        with pytest.raises(UnlearningError, match="max_shrink=1"):
            ledger.measure(tiny_llama(), tiny_tokenizer(), max_shrink=1)
        assert contents(ledger.folder) == before

    @pytest.mark.parametrize(
        ("probabilities", "named"),
        [
            ((0.9, 0.1, 0.12, 0.28), "B interferes with A: it takes 21% of the effect on its rows"),  # .78 → .62
            ((0.9, 0.1, 0.3, 0.31), "The others interfere with A: 26% of the effect that it has alone"),  # .8 → .59
            ((0.9, 0.1, 0.12, 0.15), None),  # .78 → .75, and .8 → .75
            ((0.9, 0.895, 0.5, 0.5), "A alone lowers the answer probability of its rows by 0.005 only"),
        ],
    )
    def test_words(self, probabilities, named):
        states = zip(("base", "alone", "before", "together"), probabilities, strict=True)
        scores = {state: {"probability": probability, "loss": 1.0} for state, probability in states}
        measured = Measurement("2026-11-25", ["A", "B"], "B", requests={"A": scores})
        found = measured.findings()
        assert (found[0].startswith(named) and len(found) == 1) if named else found == []

    @pytest.mark.parametrize(("now", "lost"), [(0.72, "20%"), (0.82, None)])
    def test_words_on_the_retain_set(self, now, lost):
        probabilities = {"base": 0.9, "before": 0.85, "together": now}
        retain = {state: {"probability": value, "loss": 1.0} for state, value in probabilities.items()}
        found = Measurement("2026-11-25", ["A"], "A", retain=retain).findings()
        assert [text[: text.index(" of")] for text in found] == ([f"The retain set has lost {lost}"] if lost else [])
