"""`hf-unlearn requests` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from command_lines import write_rows
from ledger_adapters import contents, dense, save_adapter
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn import Ledger
from hf_unlearn.cli import main, train
from hf_unlearn.cli.requests import ACTIONS


TRAINING = ["--learning_rate", "1e-2", "--max_steps", "4", "--disable_tqdm", "true"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, str]:
    """Files of rows of three requests: one of a single row."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        id: write_rows(folder / f"{id}.jsonl", tiny_rows(count, seed))
        for seed, (id, count) in enumerate({"one": 1, "two": 2, "three": 3}.items(), start=70)
    }


@pytest.fixture(scope="session")
def adapters(rows, tiny_model_dir, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    contents = {id: [json.loads(line) for line in Path(path).read_text().splitlines()] for id, path in rows.items()}
    return {
        id: str(save_adapter(tiny_model_dir, folder / id, seed, contents[id]))
        for seed, id in enumerate(rows, start=40)
    }


def requests(action: str, folder: Path, *options: str | Path) -> int:
    first = [options[0]] if options and not str(options[0]).startswith("-") else []
    return main(["requests", action, *map(str, first), "--ledger", str(folder), *map(str, options[len(first) :])])


@pytest.fixture
def ledger(adapters, rows, tmp_path, capsys) -> Path:
    folder = tmp_path / "ledger"
    for alpha, id in enumerate(adapters, start=1):
        options = ["--adapter", adapters[id], "--alpha", str(alpha), "--id", id, "--forget_dataset", rows[id]]
        assert requests("add", folder, *options) == 0
        hint = f"What it does to the others: hf-unlearn requests measure --ledger {folder}"
        assert (hint in capsys.readouterr().out) == (alpha > 1)
    return folder


def test_from_three_requests_to_a_build(ledger, adapters, files, tmp_path, capsys):
    assert requests("build", ledger, "--output_dir", tmp_path / "all") == 0
    assert "forgets 3 of 3 active requests (one, three, two)" in capsys.readouterr().out
    assert requests("revoke", ledger, "two", "--reason", "withdrawn by mail") == 0
    assert "2 requests are active" in capsys.readouterr().out
    assert requests("build", ledger, "--output_dir", tmp_path / "less") == 0
    before = load_file(Path(files["model"]) / "model.safetensors")
    models = {name: load_file(tmp_path / name / "model.safetensors") for name in ("all", "less")}
    alphas = {id: alpha for alpha, id in enumerate(adapters, start=1)}
    for name, ids in {"all": ("one", "two", "three"), "less": ("one", "three")}.items():
        updates = {id: dense(Path(adapters[id])) for id in ids}
        for key in updates["one"]:
            wanted = before[key].double() - sum(alphas[id] * update[key] for id, update in updates.items())
            torch.testing.assert_close(models[name][key].double(), wanted, atol=1e-6, rtol=0)

    assert requests("list", ledger) == 0
    printed = capsys.readouterr().out
    assert "withdrawn by mail" in printed and files["model"] in printed
    assert requests("purge", ledger, "two") == 0 and not (ledger / "requests" / "two").exists()
    assert requests("restore", ledger, "two") == 2
    assert requests("show", ledger, "two") == 0
    printed = capsys.readouterr().out
    assert "revoked withdrawn by mail" in printed and "status:" in printed and "purged" in printed


class TestTraining:
    def test_a_single_row_from_the_command_line(self, files, rows, tmp_path, capsys):
        folder, sets = tmp_path / "ledger", ["--retain_dataset", files["retain"], *TRAINING]
        first = ["--forget_dataset", rows["one"], "--alpha", "2", "--note", "ticket 1", *sets, "--lora_r", "3"]
        assert requests("add", folder, *first, "--model_name_or_path", files["model"]) == 0
        request = Ledger.open(folder).active()[0]
        assert (request.num_rows, request.alpha, request.note) == (1, 2, "ticket 1")
        assert json.loads((folder / "requests" / request.id / "adapter_config.json").read_text())["r"] == 3
        assert [path.name for path in folder.iterdir() if path.name.startswith(".work")] == []

        second = ["--forget_dataset", rows["two"], "--alpha", "0.5", "--id", "B", "--measure", *sets]
        assert requests("add", folder, *second) == 0  # on the base of the ledger
        printed = capsys.readouterr().out
        assert "Mean answer probability" in printed and "retain set" in printed
        assert Ledger.open(folder)["B"].metrics.keys() == {"base", "alone", "before", "together", "retain"}
        assert requests("build", folder, "--output_dir", tmp_path / "model") == 0
        base, model = (load_file(Path(f) / "model.safetensors") for f in (files["model"], tmp_path / "model"))
        updates = [dense(folder / "requests" / id) for id in (request.id, "B")]
        for key, update in updates[0].items():
            wanted = base[key].double() - 2 * update - 0.5 * updates[1][key]
            torch.testing.assert_close(model[key].double(), wanted, atol=1e-6, rtol=0)

    def test_options_from_a_file(self, files, rows, tmp_path, capsys):
        options = {
            "model_name_or_path": files["model"],
            "forget_dataset": rows["two"],
            "retain_dataset": files["retain"],
            "max_steps": 2,
            "lora_r": 5,
            "disable_tqdm": True,
        }
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(options))
        arguments = ["--alpha", "1", "--config", tmp_path / "train.yaml", "--keep_rows"]
        assert requests("add", tmp_path / "ledger", *arguments, "--dry_run") == 0
        assert not (tmp_path / "ledger").exists()
        assert requests("add", tmp_path / "ledger", *arguments) == 0
        printed = capsys.readouterr().out
        assert "hf-unlearn sweep" not in printed  # the folder of the training is gone
        request = Ledger.open(tmp_path / "ledger").active()[0]
        folder = tmp_path / "ledger" / "requests" / request.id
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 5
        assert (folder / "rows.jsonl").read_text() == Path(rows["two"]).read_text() + "\n"

    @pytest.mark.parametrize("code", [1, 130])
    def test_one_that_does_not_end(self, ledger, files, rows, tmp_path, monkeypatch, capsys, code):
        before = contents(ledger)

        def stop(argv, says_what_next):
            output = Path(argv[argv.index("--output_dir") + 1])
            output.mkdir()
            (output / "adapter_model.safetensors").write_text("secret")
            return code

        monkeypatch.setattr(train, "run", stop)
        fresh = tmp_path / "fresh.jsonl"
        write_rows(fresh, tiny_rows(2, 90))
        options = ["--forget_dataset", fresh, "--retain_dataset", files["retain"], "--alpha", "1"]
        assert requests("add", ledger, *options) == code
        assert "no request was added" in capsys.readouterr().err
        assert contents(ledger) == before

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            (["--id", "one"], "has a request one already"),
            (["--alpha", "-1"], "alpha=-1"),
            (["--date", "x"], "not ISO 8601"),
            (["--forget_dataset", "ONE"], "same rows is in the ledger as one"),
            (["--method", "npo"], "--method npo trains no memorising adapter"),
            (["--output_dir", "x"], "--output_dir has no effect"),
            (["--resume"], "--resume has no effect"),
            (["--model_name_or_path", "OTHER"], "is not the base of the ledger"),
        ],
    )
    def test_refused_before_it_starts(self, ledger, files, rows, tmp_path, monkeypatch, capsys, options, named):
        for part in (tiny_llama(seed=6), tiny_tokenizer()):
            part.save_pretrained(tmp_path / "other")
        fresh = write_rows(tmp_path / "fresh.jsonl", tiny_rows(2, 90))
        monkeypatch.setattr(train, "run", lambda argv: pytest.fail("trained"))
        names = {"ONE": rows["one"], "OTHER": str(tmp_path / "other")}
        before = contents(ledger)
        given = ["--forget_dataset", fresh, "--retain_dataset", files["retain"], "--alpha", "1"]
        assert requests("add", ledger, *given, *(names.get(option, option) for option in options)) == 2
        assert named in capsys.readouterr().err
        assert contents(ledger) == before


def test_dry_runs_write_nothing(ledger, adapters, rows, files, tmp_path, capsys):
    assert requests("revoke", ledger, "three", "--reason", "withdrawn") == 0
    before = contents(tmp_path)
    for action, *options in [
        ["revoke", "one", "--reason", "withdrawn"],
        ["restore", "three"],
        ["purge", "three"],
        ["build", "--output_dir", tmp_path / "model"],
        ["build", "--output_dir", tmp_path / "adapter", "--format", "adapter", "--without", "one"],
        ["measure", "--retain_dataset", files["retain"]],
    ]:
        capsys.readouterr()
        assert requests(action, ledger, *options, "--dry_run") == 0
        assert "Would" in capsys.readouterr().out, action
        assert contents(tmp_path) == before, action
    new = ["--adapter", adapters["one"], "--alpha", "1", "--id", "X"]
    assert requests("add", tmp_path / "new", *new, "--dry_run") == 0
    assert "Would add the request X (1 rows, α = 1)" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_list_and_show(ledger, capsys):
    assert requests("list", ledger, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(request["id"], request["alpha"], request["data"]["rows"]) for request in listed["requests"]] == [
        ("one", 1, 1), ("two", 2, 2), ("three", 3, 3),
    ]  # fmt: skip
    assert requests("show", ledger, "two", "--json") == 0
    assert json.loads(capsys.readouterr().out) == listed["requests"][1]
    assert requests("show", ledger, "--id", "two") == 0
    assert listed["requests"][1]["data"]["sha256"] in capsys.readouterr().out


def test_measure(ledger, files, capsys):
    assert requests("measure", ledger, "--retain_dataset", files["retain"], "--max_shrink", "0.3") == 0
    printed = capsys.readouterr().out
    record = json.loads((ledger / "measurements" / "0001.json").read_text())
    assert record["newest"] == "three" and record["max_shrink"] == 0.3
    table = printed.partition("Mean answer probability")[2].splitlines()[2:5]
    lines = {line.split()[0]: line.split() for line in table}
    for alpha, id in enumerate(("one", "two", "three"), start=1):
        scores = record["requests"][id]
        wanted = [f"{scores[state]['probability']:.3f}" for state in ("base", "alone", "before", "together")]
        change = scores["together"]["probability"] - scores["before"]["probability"]
        assert lines[id][1:] == [str(alpha), str(alpha), *wanted, f"{change:+.3f}"]  # α and rows count up alike
    assert all(finding in printed for finding in record["findings"])


@pytest.mark.parametrize(
    ("action", "options", "named"),
    [
        ("add", ["--adapter", "A"], "--alpha is required"),
        ("add", ["--adapter", "A", "--alpha", "1", "--lora_r", "4"], "--lora_r 4: options of training"),
        (
            "add",
            ["--adapter", "A", "--alpha", "1", "--max_shrink", "0.2"],
            "--max_shrink has no effect without --measure",
        ),
        ("add", ["--adapter", "A", "--alpha", "1", "--dtype", "bfloat16"], "--dtype has no effect without --measure"),
        ("add", ["--alpha", "1"], "--forget_dataset is required"),
        ("build", [], "--output_dir is required"),
        ("build", ["--output_dir", "M", "--dtype", "int8"], "int8"),
        ("build", ["--output_dir", "M", "--only", "four"], "no request 'four'"),
        ("revoke", ["one"], "--reason is required"),
        ("revoke", ["--reason", "x"], "--id is required"),
        ("purge", ["one"], "Revoke it first"),
        ("measure", ["--batch_size", "0"], "--batch_size 0"),
        ("show", ["four"], "no request 'four'"),
        ("drop", ["one"], "unknown action 'drop'"),
    ],
)
def test_refused(ledger, adapters, tmp_path, capsys, action, options, named):
    before = contents(tmp_path)
    names = {"A": adapters["one"], "M": str(tmp_path / "out")}
    assert requests(action, ledger, *(names.get(option, option) for option in options)) == 2
    assert named in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_no_ledger(tmp_path, capsys):
    assert main(["requests", "list"]) == 2
    assert requests("list", tmp_path / "none") == 2
    assert "holds no ledger" in capsys.readouterr().err


def test_one_process_only(ledger, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert requests("list", ledger) == 2
    assert "--accelerate_config" in capsys.readouterr().err


def test_help(capsys):
    assert main(["requests", "--help"]) == 0
    overview = capsys.readouterr().out
    for action, (_, _, description, example) in ACTIONS.items():
        assert f"\n  {action}" in overview
        with pytest.raises(SystemExit) as exit:
            main(["requests", action, "--help"])
        assert exit.value.code == 0
        printed = capsys.readouterr().out
        assert description in printed and example in printed and "--ledger" in printed
