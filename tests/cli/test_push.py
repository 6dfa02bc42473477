"""`hf-unlearn push` and `extrapolate --push_to_hub` as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from command_lines import train_arguments
from huggingface_hub import constants
from results import ALPHA, BASE, MARKER, make_results, with_hub_base, write_results
from upload_hub import TOKEN, UploadHub

from hf_unlearn.cli import main


REPOSITORY = "me/forgetful"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    made = make_results(folder)
    return made | {name: with_hub_base(made[name], folder / f"hub-{name}") for name in made if name != "base"}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with UploadHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


class TestPush:
    def test_as_a_process(self, results, tmp_path):
        sweep = write_results(tmp_path / "sweep")
        options = ["--adapter", str(results["forget-adapter"]), "--repo_id", REPOSITORY, "--results", str(sweep)]
        with UploadHub() as hub:
            environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
            environment["HF_HUB_OFFLINE"] = "0"
            command = [sys.executable, "-m", "hf_unlearn.cli", "push", *options]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            assert f"Uploaded to {hub.url}/{REPOSITORY} (private)." in done.stdout
            assert "adapter_model.safetensors" in hub.files(REPOSITORY)
            assert MARKER.encode() not in hub.received

    def test_dry_run_shows_all_and_asks_no_hub(self, hub, results, tmp_path, capsys):
        sweep = write_results(tmp_path / "sweep")
        options = ["--model", str(results["forget-model"]), "--adapter", str(results["forget-adapter"])]
        assert main(["push", *options, "--repo_id", REPOSITORY, "--results", str(sweep), "--dry_run"]) == 0
        shown = capsys.readouterr().out
        assert hub.requests == []
        size = (results["forget-model"] / "model-00001-of-00006.safetensors").stat().st_size
        for text in ("model-00001-of-00006.safetensors", f"{size:,}", "adapter/adapter_model.safetensors", "private"):
            assert text in shown, text
        assert "Left out of --model: README.md, checkpoint-3/, forget.jsonl" in shown
        assert f"base_model: {BASE}" in shown
        assert "| `forget_probability` | 2 | 0.8 [0.7, 0.9] | 0.6 [0.5, 0.7] |" in shown
        assert MARKER not in shown

    def test_dry_run_works_offline(self, results, capsys):
        options = ["--adapter", str(results["forget-adapter"]), "--repo_id", REPOSITORY]
        assert main(["push", *options, "--dry_run"]) == 0
        assert main(["push", *options]) == 2
        assert "HF_HUB_OFFLINE" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            (["--adapter", "ADAPTER"], "--repo_id"),
            (["--repo_id", REPOSITORY], "--model"),
            (["--repo_id", REPOSITORY, "--adapter", "MEMORISING"], "memorising"),
            (["--repo_id", REPOSITORY, "--adapter", "ADAPTER", "--results", "missing"], "missing"),
            (["--repo_id", REPOSITORY, "--adapter", "ADAPTER", "--token", "hf_x"], "--token"),
        ],
    )
    def test_bad_input(self, hub, results, capsys, options, named):
        folders = {"ADAPTER": "forget-adapter", "MEMORISING": "memorising"}
        argv = [str(results[folders[part]]) if part in folders else part for part in options]
        assert main(["push", *argv]) == 2
        assert named in capsys.readouterr().err
        assert hub.requests == []

    def test_a_failure_ends_with_1_and_the_way_on(self, hub, results, capsys):
        hub.failures["commit"] = 403
        options = ["--adapter", str(results["forget-adapter"]), "--repo_id", REPOSITORY, "--public"]
        assert main(["push", *options]) == 1
        error = capsys.readouterr().err
        assert "(403)" in error
        assert error.splitlines()[-1].strip() == f"hf-unlearn push {' '.join(options)}"
        assert "publishes what was to be forgotten" in error

    def test_public(self, hub, results, capsys):
        options = ["--adapter", str(results["forget-adapter"]), "--repo_id", REPOSITORY, "--public"]
        assert main(["push", *options]) == 0
        assert "(public)" in capsys.readouterr().out
        assert not hub.repositories[REPOSITORY].private


class TestExtrapolate:
    def arguments(self, results, output, *extra: str) -> list[str]:
        adapter = str(results["memorising"])
        return ["extrapolate", "--adapter", adapter, "--alpha", str(ALPHA), "--output_dir", str(output), *extra]

    def test_what_was_written_is_uploaded(self, hub, results, tmp_path):
        push = ["--format", "adapter", "--push_to_hub", "--hub_model_id", REPOSITORY]
        assert main(self.arguments(results, tmp_path / "out", *push)) == 0
        written = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        assert hub.files(REPOSITORY)["adapter_model.safetensors"] == written
        assert hub.repositories[REPOSITORY].private

    def test_it_is_checked_before_the_merge(self, hub, results, tmp_path, capsys):
        push = ["--format", "adapter", "--push_to_hub", "--hub_model_id"]
        assert main(self.arguments(results, tmp_path / "out", *push, "others/x")) == 2
        assert "others" in capsys.readouterr().err
        hub.failures["whoami"] = 401
        assert main(self.arguments(results, tmp_path / "out", *push, REPOSITORY)) == 1
        assert not (tmp_path / "out").exists()

    def test_a_failure_keeps_what_was_written(self, hub, results, tmp_path, capsys):
        hub.failures["commit"] = 409
        push = ["--format", "adapter", "--push_to_hub", "--hub_model_id", REPOSITORY]
        assert main(self.arguments(results, tmp_path / "out", *push)) == 1
        assert f"hf-unlearn push --adapter {tmp_path / 'out'} --repo_id {REPOSITORY}" in capsys.readouterr().err
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()

    @pytest.mark.parametrize(
        ("options", "named"), [(["--push_to_hub"], "--hub_model_id"), (["--hub_model_id", "me/x"], "--hub_model_id")]
    )
    def test_options_that_need_each_other(self, hub, results, tmp_path, capsys, options, named):
        assert main(self.arguments(results, tmp_path / "out", *options)) == 2
        assert named in capsys.readouterr().err


class TestTrain:
    def test_rounds_refuse(self, files, tmp_path, capsys):
        push = ["--push_to_hub", "true", "--hub_model_id", REPOSITORY]
        assert main(train_arguments(files, tmp_path / "run", "--rounds", "2", *push)) == 2
        assert "--push_to_hub" in capsys.readouterr().err

    def test_a_local_base_is_refused_before_training(self, hub, files, tmp_path, capsys):
        push = ["--push_to_hub", "true", "--hub_model_id", REPOSITORY]
        assert main(train_arguments(files, tmp_path / "run", *push)) == 2
        assert "base_model" in capsys.readouterr().err
        assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
