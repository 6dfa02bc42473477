"""What all commands share: JSON on stdout, logging, colours, reporting, variables of the Hub, completion."""

from __future__ import annotations

import gc
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_lines import set_arguments, train_arguments
from safetensors.torch import load_file

import hf_unlearn
from hf_unlearn.cli import COMMANDS, main
from hf_unlearn.cli.common import quiet_loading
from hf_unlearn.cli.completion import SHELLS, all_options, bash, fish, zsh
from hf_unlearn.cli.reporting import AVAILABLE, report_curves
from hf_unlearn.evaluation import Evaluation
from hf_unlearn.evaluation.figures import Figure


FAST = ["--no_cache", "--max_new_tokens", "4"]


@pytest.fixture
def document(capfd):
    """Runs a command with `--json` and gives the document, which is all of stdout."""

    def run(*argv: str | Path, codes: tuple[int, ...] = (0,)) -> dict:
        capfd.readouterr()
        assert main([*map(str, argv), "--json"]) in codes
        printed = capfd.readouterr().out
        return json.loads(printed, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def without_rows(folder: Path) -> list[dict]:
    """The evaluations of a folder, as far as they say nothing of single rows."""
    kept = ("protocol", "alpha", "figures")
    return [{name: each[name] for name in kept} for each in read(folder / "evaluation.json")["evaluations"]]


class TestJson:
    def test_train(self, files, tmp_path, document):
        planned = document(*train_arguments(files, tmp_path / "run", "--dry_run"))
        assert planned["dry_run"] is True and planned["plan"]["steps"] == "10 (1 an epoch)"
        assert (planned["data"]["forget"]["rows"], planned["data"]["retain"]["rows"]) == (6, 6)
        options = ["--max_steps", "2", "--logging_steps", "1"]
        done = document(*train_arguments(files, tmp_path / "run", *options))
        assert done["log_history"] == read(tmp_path / "run" / "trainer_state.json")["log_history"]
        assert [entry["step"] for entry in done["log_history"] if "loss" in entry] == [1, 2]
        assert done["data"] == planned["data"] and done["output_dir"] == str(tmp_path / "run")

    def test_eval(self, files, adapter, tmp_path, document):
        command = ["eval", "--adapter", adapter, "--alphas", "1", *set_arguments(files, "forget", "retain"), *FAST]
        planned = document(*command, "--output_dir", tmp_path / "e", "--dry_run")
        assert "6 forget, 6 retain rows" in planned["plan"] and not (tmp_path / "e").exists()
        done = document(*command, "--output_dir", tmp_path / "e")
        assert done["evaluations"] == without_rows(tmp_path / "e") and done["collapsed"] == []
        assert [each["alpha"] for each in done["evaluations"]] == [0, 1]

    def test_sweep_and_its_curves_in_tensorboard(self, files, adapter, tmp_path, document, monkeypatch):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        options = [
            "--alphas",
            "0.5",
            "1.25",
            "--rule",
            "utility-budget",
            "--min_utility",
            "0.01",
            "--refinements",
            "0",
        ]
        options += ["--no_generation", *set_arguments(files, "forget", "retain"), *FAST, "--report_to", "tensorboard"]
        done = document("sweep", "--adapter", adapter, *options, "--output_dir", tmp_path / "s")
        assert done["choice"] == read(tmp_path / "s" / "choice.json")
        assert done["evaluations"] == without_rows(tmp_path / "s")

        (folder,) = (tmp_path / "s" / "runs").iterdir()
        events = accumulator.EventAccumulator(str(folder)).Reload()
        wanted = {
            name: {round(1000 * each["alpha"]): each["figures"][name]["value"] for each in done["evaluations"]}
            for name in ("forget_probability", "retain_probability")
        }
        for name, curve in wanted.items():
            drawn = {event.step: event.value for event in events.Scalars(f"eval/{name}")}
            assert drawn.keys() == curve.keys() == {0, 500, 1250}
            assert drawn == pytest.approx(curve, rel=1e-6)  # the files hold fp32

    def test_extrapolate(self, adapter, tmp_path, document):
        command = ["extrapolate", "--adapter", adapter, "--alpha", "2", "--output_dir"]
        planned = document(*command, tmp_path / "m", "--dry_run")
        done = document(*command, tmp_path / "m")
        assert done["realised_error"] == read(tmp_path / "m" / "unlearning.json")["realised_error"]["relative"]
        assert (done["alpha"], done["output_dir"]) == (2, str(tmp_path / "m"))
        assert planned["files"]["model.safetensors"] == 4 * 65_856  # its parameters in fp32
        assert document(*command, tmp_path / "a", "--format", "adapter")["output_dir"] == str(tmp_path / "a")

        served = document("export", "--format", "vllm", "--adapter", tmp_path / "a", "--output_dir", tmp_path / "v")
        rank = read(tmp_path / "v" / "adapter_config.json")["r"]
        assert served["max_lora_rank"] == rank == 16 and str(tmp_path / "v") in served["command"]

    def test_combine(self, adapter, tmp_path, document):
        shutil.copytree(adapter, tmp_path / "copy")
        command = ["combine", "--operator", "average", "--adapters", adapter, tmp_path / "copy", "--output_dir"]
        done = document(*command, tmp_path / "mean")
        factors = load_file(Path(adapter) / "adapter_model.safetensors")
        updates = [
            2 * factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double()
            for name in factors
            if "lora_A" in name
        ]
        norm = torch.stack([update.square().sum() for update in updates]).sum().sqrt().item()
        for entry in (*done["adapters"], done["result"]):
            assert entry["norm"] == pytest.approx(norm, rel=1e-6) and entry["modules"] == len(updates)
            assert entry["cosines"] == pytest.approx([1, 1], abs=1e-6)
        assert [entry["ranks"] for entry in done["adapters"]] == [[16], [16]]

    def test_sample(self, files, tmp_path, document):
        command = ["sample", "--model_name_or_path", files["model"], "--num_rows", "5", "--max_new_tokens", "4"]
        done = document(*command, "--output_file", tmp_path / "rows.jsonl", "--cache_dir", tmp_path / "cache")
        lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        assert done == {"rows": len(lines), "output_file": str(tmp_path / "rows.jsonl")}

    def test_requests(self, files, adapter, tmp_path, document):
        ledger = ["--ledger", tmp_path / "ledger"]
        new = ["--adapter", adapter, "--alpha", "2", "--id", "one", "--forget_dataset", files["forget"]]
        added = document("requests", "add", *ledger, *new, "--measure")
        recorded = read(tmp_path / "ledger" / "requests.json")["requests"]
        assert added["measurement"] == read(tmp_path / "ledger" / "measurements" / "0001.json")
        listed = document("requests", "list", *ledger)
        assert listed["requests"] == recorded and listed["base"]["id"] == files["model"]
        assert document("requests", "show", "one", *ledger) == recorded[0]
        measured = document("requests", "measure", *ledger)["measurement"]
        assert measured == read(tmp_path / "ledger" / "measurements" / "0002.json")
        built = document("requests", "build", *ledger, "--output_dir", tmp_path / "m")
        assert built["requests"] == ["one"] and built["output_dir"] == str(tmp_path / "m")
        revoked = document("requests", "revoke", "one", *ledger, "--reason", "withdrawn")
        assert revoked["request"]["history"][-1]["reason"] == "withdrawn"
        assert document("requests", "restore", "one", *ledger, "--dry_run") == {
            "dry_run": True, "plan": "Would restore one.",
        }  # fmt: skip

    def test_quickstart(self, files, tmp_path, document):
        command = [
            "quickstart",
            "--model",
            files["model"],
            "--plant_epochs",
            "1",
            "--steps",
            "1",
            "--min_utility",
            "0",
        ]
        planned = document(*command, "--output_dir", tmp_path / "q", "--dry_run")
        assert "Sample set: 10 forget" in planned["plan"]
        done = document(*command, "--output_dir", tmp_path / "q", codes=(0, 1))  # 1: a random model misses the rule
        assert done["choice"] == read(tmp_path / "q" / "result" / "choice.json")
        assert done["evaluations"] == without_rows(tmp_path / "q" / "result")

    def test_a_file_of_options_may_ask_for_it(self, adapter, tmp_path, capfd):
        (tmp_path / "options.yaml").write_text(f"adapter: {adapter}\nalpha: 2\njson: true\ndry_run: true\n")
        command = ["extrapolate", "--config", str(tmp_path / "options.yaml"), "--output_dir", str(tmp_path / "m")]
        assert main(command) == 0
        assert json.loads(capfd.readouterr().out)["dry_run"] is True

    def test_a_failure_prints_no_document_and_stdout_is_given_back(self, adapter, tmp_path, capfd):
        before = sys.stdout
        command = ["extrapolate", "--adapter", adapter, "--alpha", "-1", "--output_dir", str(tmp_path / "m"), "--json"]
        assert main(command) == 2
        printed = capfd.readouterr()
        assert printed.out == "" and "alpha" in printed.err
        assert sys.stdout is before
        assert main(["extrapolate", "--adapter", adapter, "--alpha", "1", "--output_dir", str(tmp_path / "m")]) == 0
        assert "Forget model" in capfd.readouterr().out

    @pytest.mark.parametrize("command", [["playground"], ["completion", "bash"]], ids=" ".join)
    def test_commands_without_it_say_so(self, command, capfd):
        assert main([*command, "--json"]) == 2
        printed = capfd.readouterr()
        assert printed.out == "" and "--json" in printed.err


class TestLogging:
    CODE = "import hf_unlearn; import logging; hf_unlearn.logging.set_verbosity_info() if {info} else None\n"
    TALK = "log = logging.getLogger('hf_unlearn.x'); log.info('said'); log.warning('warned'); log.error('failed')\n"

    def talk(self, code: str, **environment: str) -> list[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(hf_unlearn.__file__).parents[1]),
        } | environment
        command = [sys.executable, "-c", code + self.TALK]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stderr.splitlines()

    @pytest.mark.parametrize(
        ("verbosity", "said"),
        [
            (None, ["warned", "failed"]),
            ("info", ["said", "warned", "failed"]),
            ("ERROR", ["failed"]),
            ("critical", []),
        ],
    )
    def test_the_variable(self, verbosity, said):
        environment = {} if verbosity is None else {"HF_UNLEARN_VERBOSITY": verbosity}
        assert self.talk(self.CODE.format(info=False), **environment) == said

    def test_a_value_that_is_not_known(self):
        first, *rest = self.talk(self.CODE.format(info=False), HF_UNLEARN_VERBOSITY="loud")
        assert "HF_UNLEARN_VERBOSITY=loud" in first and "debug, info" in first
        assert rest == ["warned", "failed"]

    def test_functions_win_and_nothing_is_said_twice(self):
        code = self.CODE.format(info=True)
        assert self.talk(code, HF_UNLEARN_VERBOSITY="error") == ["said", "warned", "failed"]
        lines = self.talk(code + "logging.basicConfig(format='app: %(message)s')\n")
        assert lines == ["app: said", "app: warned", "app: failed"]

    def test_levels(self):
        before = hf_unlearn.logging.get_verbosity()
        try:
            for name in ("debug", "info", "warning", "error"):
                getattr(hf_unlearn.logging, f"set_verbosity_{name}")()
                assert hf_unlearn.logging.get_verbosity() == getattr(hf_unlearn.logging, name.upper())
        finally:
            hf_unlearn.logging.set_verbosity(before)

    def test_every_bar_of_the_package_obeys(self):
        for path in Path(hf_unlearn.__file__).parent.rglob("*.py"):
            assert "from tqdm" not in path.read_text(encoding="utf-8"), path

    def test_progress_bars_stay_off_while_models_are_loaded(self):
        import datasets
        from huggingface_hub.utils import are_progress_bars_disabled
        from transformers.utils import logging as of_transformers

        hf_unlearn.logging.disable_progress_bar()
        try:
            with quiet_loading():
                assert are_progress_bars_disabled()
            assert are_progress_bars_disabled() and not of_transformers.is_progress_bar_enabled()
            assert datasets.are_progress_bars_disabled()
        finally:
            hf_unlearn.logging.enable_progress_bar()
        assert not are_progress_bars_disabled() and of_transformers.is_progress_bar_enabled()
        with quiet_loading():
            assert are_progress_bars_disabled()
        assert not are_progress_bars_disabled()


def test_what_is_no_terminal_gets_no_escape_sequences(adapter, tmp_path, capfd):
    command = ["extrapolate", "--adapter", adapter, "--alpha", "2", "--output_dir", str(tmp_path / "m"), "--dry_run"]
    assert main(command) == 0
    printed = capfd.readouterr().out
    assert "model.safetensors" in printed and "\x1b" not in printed


def test_a_call_from_python_leaves_garbage_collection_as_it_is(capsys):
    kept = gc.get_freeze_count()
    assert main(["eval"]) == 2
    assert gc.isenabled() and gc.get_freeze_count() == kept


def test_variables_of_the_environment(files, tmp_path):
    """A process on a terminal, as they are read at import: NO_COLOR leaves bold numbers, HF_HOME takes what is kept."""
    home = tmp_path / "home"
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"NO_COLOR": "1", "TERM": "xterm-256color"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "hf_unlearn.cli", "sample", "--output_file", str(tmp_path / "rows.jsonl")]
    command += ["--num_rows", "3", "--max_new_tokens", "3", "--model_name_or_path", files["model"]]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    printed = read_terminal(ours)
    assert process.wait() == 0
    assert "rows written to" in printed and "\x1b[1m" in printed
    codes = {int(code) for part in printed.split("\x1b[")[1:] for code in part.split("m")[0].split(";") if code}
    assert not codes & {*range(30, 39), *range(40, 49), *range(90, 98), *range(100, 108)}
    assert list((home / "hf_unlearn" / "retain").glob("*.json"))


def read_terminal(file: int) -> str:
    """Everything up to the end of the program."""
    printed = b""
    with os.fdopen(file, "rb", buffering=0) as terminal:
        try:
            while part := terminal.read(4096):
                printed += part
        except OSError:  # how Linux says that the other end is closed
            pass
    return printed.decode("utf-8")


class TestReporting:
    def test_trackio(self, tmp_path, monkeypatch):
        """Its database, read by its own functions."""
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read at import
        storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
        evaluations = [Evaluation("custom", alpha, figures={"f": Figure(1 / (1 + alpha), 5)}) for alpha in (0.0, 0.5)]
        report_curves(["trackio"], evaluations, tmp_path, "sweep")
        logs = storage.get_logs("huggingface", "sweep")
        assert [log["eval/f"] for log in logs] == pytest.approx([1, 2 / 3])

    def test_a_tool_that_is_not_installed(self, files, adapter, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(AVAILABLE, "wandb", lambda: False)
        command = ["sweep", "--adapter", adapter, *set_arguments(files, "forget", "retain"), "--report_to", "wandb"]
        assert main([*command, "--output_dir", str(tmp_path / "s")]) == 2
        assert "pip install wandb" in capsys.readouterr().err
        assert not (tmp_path / "s").exists()


class TestCompletion:
    @pytest.fixture(scope="class")
    def scripts(self, tmp_path_factory) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("completion")
        options = all_options()
        paths = {shell: folder / shell for shell in SHELLS}
        for shell, script in {"bash": bash, "zsh": zsh, "fish": fish}.items():
            paths[shell].write_text(script(options), encoding="utf-8")
        return paths

    @pytest.fixture
    def complete(self, scripts):
        """What a real bash offers for the last word of a command line."""

        def run(*words: str) -> list[str]:
            code = (
                'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _hf_unlearn; printf "%s\\n" "${COMPREPLY[@]}"'
            )
            command = ["bash", "--norc", "-c", code, str(scripts["bash"]), "hf-unlearn", *words]
            result = subprocess.run(
                command, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}
            )
            assert result.stderr == ""
            return result.stdout.split()

        return run

    @pytest.mark.parametrize(
        ("words", "offered"),
        [
            (["ex"], ["extrapolate", "export"]),
            (["eval", "--ref"], ["--reference_model"]),
            (["eval", "--adapter", ""], []),  # a file
            (["extrapolate", "--format", ""], ["model", "adapter"]),
            (["sweep", "--rule", "match-"], ["match-retrain", "match-holdout"]),
            (["requests", "re"], ["revoke", "restore"]),
            (["requests", "revoke", "one", "--rea"], ["--reason"]),
            (["requests", "add", "--learning_ra"], ["--learning_rate"]),
            (["train", "--method", "np"], ["npo"]),
            (["train", "--npo_b"], ["--npo_beta"]),  # of a method other than the default
            (["completion", "--shell", "f"], ["fish"]),
            (["nonsense", "--"], []),
        ],
        ids=" ".join,
    )
    def test_bash(self, complete, words, offered):
        assert complete(*words) == offered

    def test_every_command(self, complete):
        assert complete("") == list(COMMANDS)
        for command in COMMANDS.keys() - {"requests"}:
            assert "--help" in complete(command, "--"), command

    def test_fish(self, scripts):
        if shutil.which("fish") is None:
            pytest.skip("fish is not installed")
        code = f"source {scripts['fish']}; complete -C 'hf-unlearn ex'; complete -C 'hf-unlearn eval --ref'"
        result = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True)
        assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [
            "export",
            "extrapolate",
            "--reference_model",
        ]

    def test_zsh(self, scripts, tmp_path):
        if shutil.which("zsh") is None:
            pytest.skip("zsh is not installed")
        code = f"source {scripts['zsh']}; print $_comps[hf-unlearn]"
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        result = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert "_hf_unlearn" in result.stdout

    def test_the_command_prints_the_script(self, scripts, capsys):
        assert main(["completion", "zsh"]) == 0
        assert capsys.readouterr().out == scripts["zsh"].read_text(encoding="utf-8")

    def test_the_shell_is_required(self, capsys):
        assert main(["completion"]) == 2
        assert "bash, zsh, fish" in capsys.readouterr().err
