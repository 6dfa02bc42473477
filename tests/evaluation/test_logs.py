"""Logs, read and written; and every value of the published ones reproduced from its rows."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.logs import read_log, write_open_unlearning
from hf_unlearn.evaluation.metrics import normalized_probability, rouge, truth_ratio
from hf_unlearn.evaluation.results import Evaluation


DATA = Path(__file__).parents[3] / "shared" / "data"
LOGS = DATA / "tofu_eval_logs"
needs_logs = pytest.mark.skipif(not LOGS.is_dir(), reason="needs the published logs")

MODELS = ("Llama-3.2-1B-Instruct", "Llama-2-7b-chat-hf")
RETRAINED = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
PUBLISHED = [  # folder of a log, of the retrained model's log, its forget set
    pair
    for model in MODELS
    for forget, retain in RETRAINED.items()
    for pair in (
        pytest.param(f"tofu_{model}_full/evals_{forget}", f"tofu_{model}_{retain}", forget, id=f"{model}-{forget}"),
        pytest.param(f"tofu_{model}_{retain}", None, forget, id=f"{model}-{retain}"),
    )
]

SMALL = {  # two rows, in the shape of open-unlearning
    "forget_Q_A_Prob": {
        "agg_value": 0.375,
        "value_by_index": {"0": {"prob": 0.5, "avg_loss": math.log(2)}, "3": {"prob": 0.25, "avg_loss": math.log(4)}},
    },
    "forget_Q_A_PARA_Prob": {
        "agg_value": 0.75,
        "value_by_index": {"0": {"prob": 0.5, "avg_loss": math.log(2)}, "3": {"prob": 1.0, "avg_loss": 0.0}},
    },
    "forget_Q_A_PERT_Prob": {
        "agg_value": 0.25,
        "value_by_index": {
            "0": {"prob": [0.25, 0.5], "avg_loss": [math.log(4), math.log(2)]},
            "3": {"prob": [0.125, 0.125], "avg_loss": [math.log(8), math.log(8)]},
        },
    },
    "forget_Q_A_ROUGE": {
        "agg_value": 0.5,
        "value_by_index": {
            str(row): {
                "rougeL_recall": recall,
                "rouge1_recall": recall,
                "rougeL_f1": recall,
                "ground_truth": "In Lima.",
                "generation": answer,
            }
            for row, recall, answer in ((0, 1.0, "In Lima."), (3, 0.0, "Oslo"))
        },
    },
    "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.75}, "3": {"score": 4.0}}},
    "exact_memorization": {"agg_value": 0.5, "value_by_index": {"0": {"score": 1.0}, "3": {"score": 0.0}}},
    "wf_Q_A_Prob_normalised": {"agg_value": 0.5, "value_by_index": {"0": {"prob": 0.5}}},
    "mia_min_k": {
        "forget": {"agg_value": 2.0, "value_by_index": {"0": {"score": 1.0}, "3": {"score": 3.0}}},
        "holdout": {"agg_value": 2.0, "value_by_index": {"0": {"score": 2.0}}},
        "auc": 0.5,
        "agg_value": 0.5,
    },
    "forget_quality": {"agg_value": None},
    "privleak": {"agg_value": 0.0},
}


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def evaluation(alpha: float | None) -> Evaluation:
    return Evaluation("tofu", alpha, {"forget": {"row": [0], "loss": [1.5]}}, {"forget": ["x"]}, {"a": Figure(1.0, 1)})


# ---- Reading and writing ----


def test_open_unlearning_is_read(tmp_path):
    result = read_log(write(tmp_path / "TOFU_EVAL.json", SMALL))
    assert (result.protocol, result.alpha) == ("tofu", None)
    assert result.value("forget_probability") == 0.375  # of 1/2 and 1/4
    assert result.value("membership_auc_min_k") == 0.5  # 1 and 3 against 2
    assert result.figures["forget_quality"].note == "not computed: no retrained log"
    assert result.answers == {"forget": ["In Lima.", "Oslo"]}
    assert result.rows["forget"] == {
        "row": [0, 3],
        "probability": [0.5, 0.25],
        "loss": [math.log(2), math.log(4)],
        "paraphrased_loss": [math.log(2), 0.0],
        "wrong_losses": [[math.log(4), math.log(2)], [math.log(8), math.log(8)]],
        "rouge_l_recall": [1.0, 0.0],
        "rouge_1_recall": [1.0, 0.0],
        "rouge_l_f1": [1.0, 0.0],
        "ground_truth": ["In Lima.", "In Lima."],
        "truth_ratio": [0.75, 4.0],
        "exact_memorization": [1.0, 0.0],
        "min_k_score": [1.0, 3.0],
    }
    assert result.rows["world_facts"] == {"row": [0], "normalized_probability": [0.5]}
    assert result.rows["holdout"] == {"row": [0], "min_k_score": [2.0]}
    assert read_log(tmp_path) == result


def test_what_is_written_is_the_shape_of_open_unlearning(tmp_path):
    first = read_log(write(tmp_path / "TOFU_EVAL.json", SMALL))
    first.figures = question_figures(first, None)
    write_open_unlearning(first, tmp_path / "again.json")
    content = json.loads((tmp_path / "again.json").read_text())
    model_utility = content.pop("model_utility")
    assert model_utility == {"agg_value": None}  # not computed
    assert content.keys() == SMALL.keys()
    computed = ("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob")  # whose probabilities come from losses
    for key, entry in SMALL.items():
        assert content[key]["agg_value"] == pytest.approx(entry["agg_value"]), key
        for part in ("value_by_index", "forget", "holdout"):
            if part in entry and key not in computed:
                assert content[key][part] == entry[part], key
    for key in computed:
        for row, values in SMALL[key]["value_by_index"].items():
            assert content[key]["value_by_index"][row]["prob"] == pytest.approx(values["prob"])
    assert read_log(tmp_path / "again.json").rows == first.rows


def test_rows_without_a_value_stay_without(tmp_path):
    content = {"exact_memorization": {"agg_value": 1.0, "value_by_index": {"0": {"score": 1.0}, "1": {"score": None}}}}
    result = read_log(write(tmp_path / "log.json", content))
    assert result.rows["forget"]["exact_memorization"] == [1.0, None]
    write_open_unlearning(result, tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == content | {"forget_quality": {"agg_value": None}}


def test_rows_with_one_id_cannot_be_written(tmp_path):
    result = Evaluation("custom", rows={"forget": {"row": [0, 0], "probability": [0.1, 0.2]}})
    with pytest.raises(UnlearningError, match="several rows have the same id"):
        write_open_unlearning(result, tmp_path / "log.json")


def test_our_own_log_is_read(tmp_path):
    path = tmp_path / "evaluation.json"
    assert read_log(write(path, evaluation(None).to_dict())) == evaluation(None)
    assert read_log(write(path, {"evaluations": [evaluation(4.0).to_dict()]})) == evaluation(4.0)
    sweep = {"evaluations": [evaluation(alpha).to_dict() for alpha in (0.0, 1.0, 2.0)], "choice": {"alpha": 2.0}}
    assert read_log(write(path, sweep)) == evaluation(2.0)
    write(tmp_path / "TOFU_EVAL.json", SMALL)
    assert read_log(tmp_path) == evaluation(2.0)  # ours comes first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"evaluations": [evaluation(alpha).to_dict() for alpha in (1.0, 2.0)]},
            r"at α = 1\.0, 2\.0, and none of them is the chosen one",
        ),
        ({"evaluations": [evaluation(alpha).to_dict() for alpha in (None, 0.0)]}, r"at α = None, 0\.0, and none"),
        ({"evaluations": []}, "at α = none"),
        ({"protocol": "tofu"}, "no complete evaluation"),
        ({"forget_quality": 0.01, "model_utility": 0.6}, "no log of a known shape.*not the summary"),
        ([1, 2], "no log of a known shape"),
        ({"forget_truth_ratio": {"agg_value": 0.5}}, "no complete log: 'value_by_index'"),
        ({"avg_gt_loss": {"0": 1.2}, "gt_loss": {"0": 30.0}}, "log of the first TOFU code.*300 rows at most"),
        ({"eval_log_forget.json": {"avg_gt_loss": {"0": 1.2}}}, "log of the first TOFU code"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    path = write(tmp_path / "log.json", content)
    with pytest.raises(UnlearningError, match=message) as error:
        read_log(path)
    assert str(path) in str(error.value)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(UnlearningError, match="There is no log"):
        read_log(tmp_path / "none.json")
    with pytest.raises(UnlearningError, match="holds neither TOFU_EVAL.json nor evaluation.json. Give the folder"):
        read_log(tmp_path)
    (tmp_path / "evals_forget10").mkdir()
    write(tmp_path / "evals_forget10" / "TOFU_EVAL.json", SMALL)
    with pytest.raises(UnlearningError, match="Give one of .*evals_forget10"):
        read_log(tmp_path)
    for broken in (b"{", b"\xff\xfe\x00"):
        (tmp_path / "log.json").write_bytes(broken)
        with pytest.raises(UnlearningError, match="is not JSON"):
            read_log(tmp_path / "log.json")


# ---- Published logs ----


@cache
def published(folder: str) -> dict:
    return json.loads((LOGS / folder / "TOFU_EVAL.json").read_text())


_rouge = cache(rouge)  # many answers are the same in several logs


def published_value(value: float | None):
    return None if value is None else pytest.approx(value, rel=1e-6, abs=0)


def evaluate_published(folder: str, retrained: str | None) -> Evaluation:
    result = read_log(LOGS / folder)
    result.figures = question_figures(result, None if retrained is None else read_log(LOGS / retrained))
    return result


@needs_logs
@pytest.mark.parametrize(("folder", "retrained", "forget"), PUBLISHED)
def test_every_published_value_is_reproduced(folder, retrained, forget, tmp_path):
    result = evaluate_published(folder, retrained)
    write_open_unlearning(result, tmp_path / "log.json")
    ours, log = json.loads((tmp_path / "log.json").read_text()), published(folder)
    assert ours.keys() == log.keys()
    assert {key: entry["agg_value"] for key, entry in ours.items()} == {
        key: published_value(entry["agg_value"]) for key, entry in log.items()
    }
    summary = json.loads((LOGS / folder / "TOFU_SUMMARY.json").read_text())
    assert len(summary) >= 11
    for key, value in summary.items():
        assert ours[key]["agg_value"] == published_value(value), key


@needs_logs
@pytest.mark.parametrize(("folder", "retrained", "forget"), PUBLISHED)
def test_figures_have_the_published_values(folder, retrained, forget):
    figures, log = evaluate_published(folder, retrained).figures, published(folder)
    names = {
        "forget_probability": "forget_Q_A_Prob",
        "forget_rouge_l_recall": "forget_Q_A_ROUGE",
        "forget_truth_ratio": "forget_truth_ratio",
        "forget_exact_memorization": "exact_memorization",
        "forget_extraction_strength": "extraction_strength",
        "forget_quality": "forget_quality",
        "model_utility": "model_utility",
        "privleak": "privleak",
        "retain_probability": "retain_Q_A_Prob",
        "retain_truth_ratio": "retain_Truth_Ratio",
        "real_authors_normalized_probability": "ra_Q_A_Prob_normalised",
        "world_facts_rouge_l_recall": "wf_Q_A_ROUGE",
        "membership_auc_loss": "mia_loss",
        "membership_auc_min_k": "mia_min_k",
    }
    assert {name: figures[name].value for name in names} == {
        name: published_value(log[key]["agg_value"]) for name, key in names.items()
    }
    assert figures["forget_probability"].n == {"forget01": 40, "forget05": 200, "forget10": 400}[forget]


@needs_logs
@pytest.mark.parametrize(("folder", "retrained", "forget"), PUBLISHED)
def test_every_published_row_is_reproduced(folder, retrained, forget):
    result = read_log(LOGS / folder)
    for name in ("forget", "retain", "real_authors", "world_facts"):
        columns = result.rows[name]
        assert columns["probability"] == pytest.approx([math.exp(-loss) for loss in columns["loss"]], rel=2e-7)  # fp32
        correct = columns.get("paraphrased_loss", columns["loss"])
        ratios = [truth_ratio(*losses) for losses in zip(correct, columns["wrong_losses"], strict=True)]
        assert columns["truth_ratio"] == pytest.approx(ratios, rel=1e-12)
        if "normalized_probability" in columns:
            wrong = [[math.exp(-loss) for loss in losses] for losses in columns["wrong_losses"]]
            pairs = zip(columns["probability"], wrong, strict=True)
            normalized = [normalized_probability(*pair) for pair in pairs]
            assert columns["normalized_probability"] == pytest.approx(normalized, rel=2e-7)
        scores = [_rouge(*pair) for pair in zip(columns["ground_truth"], result.answers[name], strict=True)]
        for column in ("rouge_1_recall", "rouge_l_recall", "rouge_l_f1"):
            assert columns[column] == pytest.approx([getattr(row, column) for row in scores], abs=1e-12)


@needs_logs
@pytest.mark.parametrize(("folder", "retrained", "forget"), [case for case in PUBLISHED if case.values[1]])
def test_the_reference_attack_from_the_losses_of_both_logs(folder, retrained, forget):
    # the published scores come from another forward pass of the reference model, in bf16 and in other batches
    result = read_log(LOGS / folder)
    for name in ("forget", "holdout"):
        theirs = result.rows[name].pop("reference_score")
        reference = read_log(LOGS / retrained).rows[name]["loss"]
        ours = [loss - other for loss, other in zip(result.rows[name]["loss"], reference, strict=True)]
        assert ours == pytest.approx(theirs, abs=0.06)
    figure = question_figures(result, read_log(LOGS / retrained))["membership_auc_reference"]
    assert figure.value == pytest.approx(published(folder)["mia_reference"]["agg_value"], abs=1e-3)


@needs_logs
def test_logs_of_another_split_are_refused():
    full = read_log(LOGS / "tofu_Llama-3.2-1B-Instruct_full" / "evals_forget01")
    other = read_log(LOGS / "tofu_Llama-3.2-1B-Instruct_retain95")
    with pytest.raises(UnlearningError, match="forget set: 40 rows were evaluated, and the retrained log has 200"):
        question_figures(full, other)
    with pytest.raises(UnlearningError, match="same model or file"):
        question_figures(full, full)


@needs_logs
@pytest.mark.parametrize("forget", RETRAINED)
def test_the_rows_of_the_logs_are_those_of_the_sets(forget):
    result = read_log(LOGS / "tofu_Llama-3.2-1B-Instruct_full" / f"evals_{forget}")
    rows = json.loads((DATA / "tofu" / f"{forget}.json").read_text())
    texts = [result.rows["forget"]["ground_truth"][result.rows["forget"]["row"].index(i)] for i in range(len(rows))]
    assert ["".join(text.split()) for text in texts] == ["".join(row["answer"].split()) for row in rows]
