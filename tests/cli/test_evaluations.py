"""`hf-unlearn eval` and `hf-unlearn sweep` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_lines import set_arguments
from tiny import tiny_llama

from hf_unlearn.cli import main, outputs
from hf_unlearn.evaluation import Evaluation, Figure, scoring


LOGS = Path(__file__).parents[3] / "shared" / "data" / "tofu_eval_logs"
EVALUATION_OUTPUTS = {"report.html", "evaluation.json", "figures.csv", "rows.csv", "evaluation.png"}


class TestEval:
    def test_a_model(self, files, tmp_path, capsys):
        arguments = ["eval", "--model", files["model"], "--max_new_tokens", "4", "--output_dir", str(tmp_path / "e")]
        arguments += set_arguments(files, "forget", "retain", "holdout")
        assert main(arguments) in (0, 1)  # a random model may well count as collapsed
        assert {path.name for path in (tmp_path / "e").iterdir()} == EVALUATION_OUTPUTS
        text = capsys.readouterr().out
        assert "forget_quality: not computed: no retrained log" in text
        assert "retain_kl: not computed: no reference model" in text
        assert main(arguments) == 2
        assert "--overwrite" in capsys.readouterr().err

    def test_an_adapter_at_several_alphas_equals_the_models_written_at_them(self, files, adapter, tmp_path):
        sets = set_arguments(files, "forget", "retain", "holdout")
        common = ["--max_new_tokens", "4", *sets]
        arguments = ["eval", "--adapter", adapter, "--alphas", "0.25", "2", "--output_dir", str(tmp_path / "e")]
        assert main([*arguments, *common]) == 0
        live = json.loads((tmp_path / "e" / "evaluation.json").read_text())["evaluations"]
        assert [one["alpha"] for one in live] == [0.0, 0.25, 2.0]
        model = tmp_path / "forget-model"
        assert main(["extrapolate", "--adapter", adapter, "--alpha", "2", "--output_dir", str(model)]) == 0
        arguments = ["eval", "--model", str(model), "--reference_model", files["model"]]
        assert main([*arguments, *common, "--output_dir", str(tmp_path / "m")]) in (0, 1)
        merged = json.loads((tmp_path / "m" / "evaluation.json").read_text())["evaluations"][0]
        assert merged["alpha"] is None
        for name, columns in merged["rows"].items():
            for column in ("loss", "extraction_strength", "kl", "min_k_plus_plus_score"):
                if column in columns:
                    assert columns[column] == pytest.approx(live[2]["rows"][name][column], abs=1e-4), column
        assert merged["answers"] == live[2]["answers"]

    def test_an_interrupted_evaluation_goes_on(self, files, tmp_path, monkeypatch):
        arguments = ["eval", "--model", files["model"], "--max_new_tokens", "4", "--output_dir", str(tmp_path / "e")]
        arguments += ["--batch_size", "2", *set_arguments(files, "forget", "retain")]
        score_batch, calls = scoring._score_batch, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return score_batch(*args)

        monkeypatch.setattr(scoring, "_score_batch", interrupted)
        assert main(arguments) == 130
        assert not (tmp_path / "e").exists()
        assert main(arguments) in (0, 1)
        # three batches of two forget rows and of two retain rows; the two done before are not run again
        assert len(calls) == 3 + 4

    def test_dry_run(self, files, adapter, tmp_path, capsys):
        sets = set_arguments(files, "forget", "retain")
        arguments = ["eval", "--adapter", adapter, "--output_dir", str(tmp_path / "e"), "--dry_run", *sets]
        assert main(arguments) == 0
        assert "6 forget, 6 retain" in capsys.readouterr().out
        assert not (tmp_path / "e").exists()

    def test_two_processes_write_one_result(self, interpreters, files, tmp_path):
        arguments = ["eval", "--model", files["model"], "--max_new_tokens", "4"]
        arguments += set_arguments(files, "forget", "retain", "holdout")
        assert main([*arguments, "--output_dir", str(tmp_path / "one")]) in (0, 1)
        command = ["-m", "hf_unlearn.cli", *arguments, "--output_dir", tmp_path / "two"]
        interpreters.launch(*command, environment={"ACCELERATE_USE_CPU": "true"})
        one, two = (
            json.loads((tmp_path / name / "evaluation.json").read_text())["evaluations"][0] for name in ("one", "two")
        )
        assert one["answers"] == two["answers"]
        one, two = ({name: figure["value"] for name, figure in each["figures"].items()} for each in (one, two))
        assert {name: two[name] for name in one if one[name] is None} == {"forget_quality": None, "retain_kl": None}
        assert {name: two[name] for name in one if one[name] is not None} == pytest.approx(
            {name: value for name, value in one.items() if value is not None}, rel=1e-5
        )
        assert len(list((tmp_path / "two.cache").glob("*.jsonl"))) == 2

    @pytest.mark.skipif(not LOGS.exists(), reason="needs the published evaluation logs")
    def test_a_published_log(self, tmp_path, capsys):
        log = LOGS / "tofu_Llama-3.2-1B-Instruct_full" / "evals_forget01"
        retrained = LOGS / "tofu_Llama-3.2-1B-Instruct_retain99"
        arguments = ["eval", "--log", str(log), "--output_dir", str(tmp_path / "e"), "--retrained_log"]
        assert main([*arguments, str(retrained)]) == 0
        figures = json.loads((tmp_path / "e" / "evaluation.json").read_text())["evaluations"][0]["figures"]
        assert figures["forget_quality"]["value"] == pytest.approx(0.006760732303569208, rel=1e-6)
        assert figures["model_utility"]["value"] == pytest.approx(0.5991534707368931, rel=1e-6)
        assert (tmp_path / "e" / "TOFU_EVAL.json").exists()
        capsys.readouterr()
        assert main([*arguments, str(log), "--overwrite"]) == 2
        assert "the same file" in capsys.readouterr().err
        other = LOGS / "tofu_Llama-3.2-1B-Instruct_retain90"
        assert main([*arguments, str(other), "--overwrite"]) == 2
        assert "40 rows" in capsys.readouterr().err


class TestSweep:
    def test_outputs_and_exit_code(self, files, adapter, tmp_path, capsys):
        arguments = ["sweep", "--adapter", adapter, "--alphas", "0.25", "0.5", "--max_new_tokens", "4"]
        for name in ("forget", "retain", "holdout"):
            arguments += [f"--{name}_dataset", files[name]]
        code = main([*arguments, "--output_dir", str(tmp_path / "s")])
        names = {path.name for path in (tmp_path / "s").iterdir()}
        assert names == {*EVALUATION_OUTPUTS, "choice.json"}
        choice = json.loads((tmp_path / "s" / "choice.json").read_text())
        assert code == (0 if choice["met"] else 1)
        assert choice["verdict"] in capsys.readouterr().out
        assert main([*arguments, "--output_dir", str(tmp_path / "s")]) == 2

    def test_dry_run(self, files, adapter, tmp_path, capsys):
        arguments = ["sweep", "--adapter", adapter, "--output_dir", str(tmp_path / "s"), "--dry_run"]
        assert main([*arguments, "--forget_dataset", files["forget"], "--retain_dataset", files["retain"]]) == 0
        text = capsys.readouterr().out
        assert "6 forget, 6 retain" in text
        assert "report.html" in text
        assert "memory" in text
        assert not (tmp_path / "s").exists()

    def test_another_base_is_refused_also_in_a_dry_run(self, files, adapter, tmp_path, capsys):
        tiny_llama(seed=9).save_pretrained(tmp_path / "other")
        arguments = ["sweep", "--adapter", adapter, "--output_dir", str(tmp_path / "s"), "--dry_run"]
        arguments += ["--forget_dataset", files["forget"], "--retain_dataset", files["retain"]]
        assert main([*arguments, "--base", str(tmp_path / "other")]) == 2
        assert "not the base model" in capsys.readouterr().err


MUSE = {
    "verbmem/forget": [{"prompt": "w4 w5", "gt": "w6 w7"}],
    **{
        f"knowmem/{name}": [{"question": "w4", "answer": "w8 w9"}]
        for name in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl")
    },
    "privleak/forget": ["w10 w11 w12", "w13 w14"],
    "privleak/holdout": ["w15 w16 w17", "w18 w19"],
}
LUME = {
    side: [
        {"id": f"{side}{task}{kind}1", "task": f"Task{task}", "input": "w4 w5", "output": "w6 w7"}
        for task in (1, 2, 3)
        for kind in ("sc", "qa")
    ]
    for side in ("forget", "retain")
} | {"mia_data/member": [{"document": "w8 w9"}], "mia_data/nonmember": [{"document": "w10 w11"}]}


def write_benchmark(folder: Path, content: dict[str, list]) -> str:
    for stem, rows in content.items():
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").write_text(json.dumps(rows), encoding="utf-8")
    return str(folder)


def evaluation_in(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["evaluations"][-1]


class TestBenchmarks:
    @pytest.mark.parametrize(
        ("protocol", "content", "figure"),
        [
            ("muse", MUSE, "verbmem"),
            ("lume", LUME, "task_aggregate"),
        ],
    )
    def test_figures_of_a_log_are_computed_anew(self, protocol, content, figure, files, tmp_path, capsys):
        data = write_benchmark(tmp_path / "data", content)
        arguments = ["eval", "--model", files["model"], "--protocol", protocol, "--data_dir", data]
        assert main([*arguments, "--output_dir", str(tmp_path / "e")]) in (0, 1)
        written = evaluation_in(tmp_path / "e")
        assert written["figures"][figure]["value"] is not None
        log = tmp_path / "log.json"
        log.write_text(json.dumps(written | {"figures": {}}))
        capsys.readouterr()
        assert main(["eval", "--log", str(log), "--output_dir", str(tmp_path / "l")]) in (0, 1)
        assert evaluation_in(tmp_path / "l") == written
        assert "Cache" not in capsys.readouterr().out
        text = (tmp_path / "l" / "report.html").read_text()
        assert outputs.PRIVACY_NOTE not in text  # it shows no rows

    def test_a_log_of_lume_has_no_use_for_a_retrained_model(self, tmp_path, capsys):
        logs = [tmp_path / name for name in ("log.json", "retrained.json")]
        for log in logs:
            log.write_text(json.dumps(Evaluation("lume").to_dict()))
        arguments = ["eval", "--log", str(logs[0]), "--retrained_log", str(logs[1])]
        assert main([*arguments, "--output_dir", str(tmp_path / "l")]) == 2
        assert "--retrained_log has no effect on a log of lume" in capsys.readouterr().err

    def test_wmdp_is_left_to_the_harness(self, files, tmp_path, monkeypatch, capsys):
        asked = {}

        def answer(model, tokenizer, **options):
            asked.update(options)
            return {"wmdp_bio": Figure(0.25, 8), "mmlu": Figure(0.5, 8)}

        monkeypatch.setattr("hf_unlearn.evaluation.protocols.wmdp.run_harness", answer)
        monkeypatch.setattr("hf_unlearn.cli.protocols.import_harness", lambda: None)
        arguments = ["eval", "--model", files["model"], "--protocol", "wmdp", "--output_dir", str(tmp_path / "e")]
        assert main([*arguments, "--dry_run"]) == 0
        assert "wmdp on its tasks" in capsys.readouterr().out
        assert main([*arguments, "--batch_size", "3", "--limit", "8", "--data_dir", "~/tasks"]) == 0
        assert asked == {"batch_size": 3, "limit": 8, "include_path": "~/tasks"}
        assert evaluation_in(tmp_path / "e")["figures"]["mmlu"]["value"] == 0.5
        assert not (tmp_path / "e.cache").exists()
        log = ["eval", "--log", str(tmp_path / "e"), "--output_dir", str(tmp_path / "l")]
        assert main(log) == 2
        assert "of the protocol 'wmdp', whose figures cannot be computed from rows" in capsys.readouterr().err

    def test_a_log_of_a_protocol_of_ones_own(self, tmp_path, capsys):
        (tmp_path / "log.json").write_text(json.dumps(Evaluation("unseen").to_dict()))
        log = ["eval", "--log", str(tmp_path / "log.json"), "--output_dir", str(tmp_path / "l")]
        assert main(log) == 2
        assert "of the protocol 'unseen'" in capsys.readouterr().err


class TestPrivateData:
    @pytest.mark.parametrize("command", ["eval", "sweep"])
    def test_the_cache_and_the_report_are_pointed_out(self, command, files, adapter, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HOME", str(tmp_path))
        arguments = [command, "--adapter", adapter, "--alphas", "0.5", "--max_new_tokens", "2"]
        arguments += [*set_arguments(files, "forget", "retain"), "--output_dir", "~/out"]
        assert main([*arguments, "--cache_dir", "~/kept"]) in (0, 1)
        assert list((tmp_path / "kept").glob("*.jsonl"))
        line = f"Cache: {tmp_path}/kept. It holds answers to the prompts of the sets."
        assert line in capsys.readouterr().out
        assert outputs.PRIVACY_NOTE in (tmp_path / "out" / "report.html").read_text()
        assert main([*arguments, "--no_cache", "--overwrite"]) in (0, 1)
        assert "Cache" not in capsys.readouterr().out
        assert not (tmp_path / "out.cache").exists()

    def test_the_cache_is_beside_the_output(self, files, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HOME", str(tmp_path))
        arguments = ["eval", "--model", files["model"], "--max_new_tokens", "2", "--output_dir", "~/out"]
        assert main([*arguments, *set_arguments(files, "forget", "retain")]) in (0, 1)
        assert f"Cache: {tmp_path}/out.cache." in capsys.readouterr().out
        assert {path.name for path in tmp_path.iterdir()} == {"out", "out.cache"}


def test_the_table_shows_the_scores_of_lume():
    names = ("final_score", "task_aggregate", "retain_score", "membership_auc_loss", "mmlu")
    figures = {name: Figure(0.1 * place, 1) for place, name in enumerate(names, start=1)}
    table = outputs.figures_table([Evaluation("lume", figures=figures)])
    assert [column.header for column in table.columns] == [
        "α",
        "final\nscore",
        "task\naggr.",
        "retain\nscore",
        "AUC",
        "MMLU",
    ]
    assert [next(iter(column.cells)) for column in table.columns] == ["–", "0.1", "0.2", "0.3", "0.4", "0.5"]
