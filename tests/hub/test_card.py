"""The card: its metadata as the Hub reads them, and what it says."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from results import ALPHA, BASE, COMMIT, MARKER, with_hub_base, write_results

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import read_provenance, write_provenance
from hf_unlearn.hub import HubPush, UnlearningModelCard


@pytest.fixture
def folders(results, tmp_path):
    return {kind: with_hub_base(results[f"forget-{kind}"], tmp_path / kind) for kind in ("model", "adapter")}


def card_of(folders, *kinds, **options) -> ModelCard:
    """The card, read back by the class of the Hub's own library."""
    push = HubPush("me/forgetful", **{kind: folders[kind] for kind in kinds}, **options)
    return ModelCard(push.files()["README.md"].decode())


class TestMetadata:
    @pytest.mark.parametrize(
        ("kinds", "relation", "library"),
        [
            (["model"], "finetune", "transformers"),
            (["adapter"], "adapter", "peft"),
            (["model", "adapter"], "finetune", "transformers"),
        ],
    )
    def test_relation_to_the_base(self, folders, kinds, relation, library):
        data = card_of(folders, *kinds).data
        assert (data.base_model, data.base_model_relation, data.library_name) == (BASE, relation, library)
        assert {"unlearning", "model-extrapolation", "hf_unlearn"} <= set(data.tags)
        assert ("lora" in data.tags) == (relation == "adapter")

    def test_licence(self, folders, results):
        assert card_of(folders, "model").data.license is None
        assert card_of(folders, "model", license="cc-by-4.0").data.license == "cc-by-4.0"
        local = HubPush("me/x", model=results["forget-model"], base_model="org/name")
        assert ModelCard(str(local.card())).data.license == "mit"  # of the README beside the base

    def test_figures(self, folders, tmp_path):
        card = card_of(folders, "model", results=write_results(tmp_path / "sweep"))
        figures = {result.metric_type: result for result in card.data.eval_results}
        assert figures.keys() == {"forget_probability", "membership_auc_loss"}  # not what has no value
        probability = figures["forget_probability"]
        assert probability.metric_value == pytest.approx(0.6)
        assert probability.metric_args["rows"] == 2
        assert probability.metric_args["interval_95"] == pytest.approx([0.5, 0.7])
        assert probability.metric_args["before"] == pytest.approx(0.8)
        assert probability.metric_args["before_interval_95"] == pytest.approx([0.7, 0.9])
        assert figures["membership_auc_loss"].metric_args == {"rows": 4, "before": 0.5}
        assert "| `forget_probability` | 2 | 0.8 [0.7, 0.9] | 0.6 [0.5, 0.7] |" in card.text
        assert "| `membership_auc_loss` | 4 | 0.5 | 0.52 |" in card.text

    def test_results_of_benchmarks(self, folders, tmp_path):
        folder = write_results(tmp_path / "sweep", protocol="tofu")
        push = HubPush("me/x", model=folders["model"], results=folder)
        entries = parse_eval_result_entries(yaml.safe_load(push.files()[".eval_results/hf_unlearn.yaml"]))
        found = {entry.task_id: entry for entry in entries}
        assert {entry.dataset_id for entry in entries} == {"locuslab/TOFU"}
        assert found["forget_probability"].value == pytest.approx(0.6)
        assert found["forget_probability"].notes == (
            "before unlearning: 0.8 [0.7, 0.9], 2 rows; after unlearning: 0.6 [0.5, 0.7], 2 rows"
        )

    def test_own_rows_are_no_benchmark(self, folders, tmp_path):
        push = HubPush("me/x", model=folders["model"], results=write_results(tmp_path / "sweep"))
        assert ".eval_results/hf_unlearn.yaml" not in push.files()

    def test_any_card_can_be_read(self):
        card = UnlearningModelCard("---\nlicense: mit\ntags:\n- x\n---\n# Another\n")
        assert card.data.license == "mit"
        assert "x" in card.data.tags


class TestText:
    def test_what_was_forgotten(self, folders):
        text = card_of(folders, "model", forgotten="Facts of {{ two }} *people*.").text
        assert "## What was forgotten\n\nFacts of {{ two }} *people*." in text
        assert "- forget set: 6 rows" in text
        assert "Not described." in card_of(folders, "model").text

    def test_how(self, folders, tmp_path):
        text = card_of(folders, "model", results=write_results(tmp_path / "sweep")).text
        assert f"revision `{COMMIT}`" in text
        assert f"| α | {ALPHA:g} |" in text
        assert "| how α was chosen | match-holdout: the AUC nearest 0.5 |" in text
        assert re.search(r"realised error \(model\) \| float32, [\d.]+e-08", text)
        assert "2602.06441" in text

    def test_a_choice_of_another_alpha_is_not_claimed(self, folders, tmp_path):
        results = write_results(tmp_path / "sweep", alphas=(0.0, ALPHA, 4.0))  # the sweep chose 4
        text = card_of(folders, "model", results=results).text
        assert "| how α was chosen | not recorded |" in text

    def test_how_to_load_it(self, folders):
        both = card_of(folders, "model", "adapter", revision="dev").text
        assert 'AutoModelForCausalLM.from_pretrained("me/forgetful", revision="dev")' in both
        assert 'PeftModel.from_pretrained(base, "me/forgetful", subfolder="adapter", revision="dev")' in both
        alone = card_of(folders, "adapter").text
        assert 'PeftModel.from_pretrained(base, "me/forgetful")' in alone
        assert "--max-lora-rank 4 --lora-modules forget=me/forgetful" in alone
        assert "AutoTokenizer" not in alone
        for block in re.findall(r"```python\n(.*?)```", both + alone, re.DOTALL):
            compile(block, "card", "exec")

    def test_no_rows_and_no_paths(self, folders, results, tmp_path):
        card = str(card_of(folders, "model", "adapter", results=write_results(tmp_path / "sweep")))
        assert MARKER not in card
        assert str(results["base"].parent) not in card


class TestResults:
    def test_an_evaluation_of_the_model_as_it_is(self, folders, tmp_path):
        folder = tmp_path / "eval"
        write_results(folder)
        path = folder / "evaluation.json"
        evaluation = json.loads(path.read_text())["evaluations"][-1] | {"alpha": None}
        path.write_text(json.dumps({"evaluations": [evaluation], "choice": None}))
        assert "| `forget_probability` | 2 | – | 0.6 [0.5, 0.7] |" in card_of(folders, "model", results=folder).text

    @pytest.mark.parametrize("content", ["no JSON", "[]", '{"evaluations": [{}]}'])
    def test_another_file(self, folders, tmp_path, content):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(UnlearningError, match=r"--results .*evaluation\.json"):
            card_of(folders, "model", results=tmp_path)

    def test_another_alpha(self, folders, tmp_path):
        with pytest.raises(UnlearningError, match="α = 2, only at 0, 1"):
            card_of(folders, "model", results=write_results(tmp_path / "sweep", alphas=(0.0, 1.0)))

    def test_model_and_adapter_of_different_runs(self, folders):
        write_provenance(folders["adapter"], read_provenance(folders["adapter"]) | {"alpha": 1.0})
        with pytest.raises(UnlearningError, match="different"):
            card_of(folders, "model", "adapter")

    def test_nothing(self):
        with pytest.raises(UnlearningError, match="--model, --adapter"):
            HubPush("me/x")
