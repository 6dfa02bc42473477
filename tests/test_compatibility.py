"""The package as it is installed: stated versions, what a wheel holds, and the whole way on whatever is installed."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_unlearn
from hf_unlearn.cli import COMMANDS, main


ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
EXTRAS = {name: value.split() for name, value in SETUP["options.extras_require"].items()}
REQUIREMENTS = [Requirement(line) for line in SETUP["options"]["install_requires"].split()]


def pins(name: str) -> dict[str, str]:
    """Versions of a constraints file by canonical name."""
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


class TestVersions:
    @pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
    def test_the_tested_version_is_in_the_stated_range(self, requirement):
        assert pins("constraints.txt")[canonicalize_name(requirement.name)] in requirement.specifier

    @pytest.mark.parametrize("extra", EXTRAS)
    def test_so_are_those_of_the_extras_that_are_pinned(self, extra):
        for requirement in map(Requirement, EXTRAS[extra]):
            version = pins("constraints.txt").get(canonicalize_name(requirement.name))
            assert version is None or version in requirement.specifier, requirement.name

    def test_every_lower_bound_is_what_the_oldest_environment_has(self):
        oldest = pins("constraints-oldest.txt")
        assert oldest.keys() == {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
        for requirement in REQUIREMENTS:
            (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
            assert oldest[canonicalize_name(requirement.name)] in Requirement(f"x=={bound}").specifier, (
                requirement.name
            )


class TestExtras:
    def test_the_readme_lists_all_and_no_others(self):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        named = {
            extra for group in re.findall(r"pip install .*?'\.\[([\w,]+)\]'", readme) for extra in group.split(",")
        }
        assert named == set(EXTRAS)

    def test_messages_name_extras_that_exist(self):
        for path in (ROOT / "hf_unlearn").rglob("*.py"):
            for extra in re.findall(r"hf-unlearn\[(\w+)\]", path.read_text(encoding="utf-8")):
                assert extra in EXTRAS, path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built without network and without a trace in it."""
    for name in ("pip", "setuptools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "hf_unlearn", source / "hf_unlearn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


class TestWheel:
    def test_it_holds_every_file_of_the_package(self, wheel):
        held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hf_unlearn/")}
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_unlearn").rglob("*") if path.is_file()}
        assert held == {name for name in files if "__pycache__" not in name}
        for name in ("py.typed", "data/people/forget.jsonl", "playground/page.css", "hub/card_template.md"):
            assert f"hf_unlearn/{name}" in held
        for folder in ("evaluation/report_page/", "audit/page/"):
            assert any(name.startswith(f"hf_unlearn/{folder}") for name in held)

    def test_metadata(self, wheel):
        archive = zipfile.ZipFile(wheel)
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode("utf-8")
        assert f"\nName: hf-unlearn\nVersion: {hf_unlearn.__version__}\n" in metadata
        assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)) == set(EXTRAS)
        assert (
            "hf-unlearn = hf_unlearn.cli:main" in archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        )

    @pytest.mark.parametrize("option", ["--version", "--help"])
    def test_version_and_overview_need_no_other_package(self, wheel, option):
        code = f"import sys; sys.path.insert(0, {str(wheel)!r}); from hf_unlearn.cli import main; main([{option!r}])"
        result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
        if option == "--version":
            assert result.stdout == f"hf-unlearn {hf_unlearn.__version__}\n"
        else:
            assert all(command in result.stdout for command in COMMANDS)


class TestSmoke:
    """What `make compatibility` runs on the oldest and the newest versions of the stated ranges."""

    def test_train_extrapolate_eval(self, tiny_model_dir, tmp_path):
        from tiny import tiny_rows

        for seed, name in enumerate(("forget", "retain")):
            lines = [json.dumps(row) for row in tiny_rows(4, seed)]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        sets = [f"--{name}_dataset={tmp_path / name}.jsonl" for name in ("forget", "retain")]
        run, model, result = (f"--output_dir={tmp_path / name}" for name in ("run", "model", "result"))
        training = ["--learning_rate=1e-2", "--max_steps=3", "--disable_tqdm=true", "--use_cpu"]
        assert main(["train", f"--model_name_or_path={tiny_model_dir}", *sets, *training, run]) == 0
        assert main(["extrapolate", f"--adapter={tmp_path / 'run'}", "--alpha=2", model]) == 0
        evaluation = [*sets, "--no_cache", "--max_new_tokens=4", result]
        assert main(["eval", f"--adapter={tmp_path / 'run'}", "--alphas", "2", *evaluation]) == 0
        live = json.loads((tmp_path / "result" / "evaluation.json").read_text(encoding="utf-8"))["evaluations"][-1]
        # a random model speaks no language, which `eval` may call collapsed
        assert main(["eval", f"--model={tmp_path / 'model'}", "--overwrite", *evaluation]) in (0, 1)
        written = json.loads((tmp_path / "result" / "evaluation.json").read_text(encoding="utf-8"))["evaluations"][-1]
        assert live["alpha"] == 2
        for name in ("forget", "retain"):
            assert written["rows"][name]["loss"] == pytest.approx(live["rows"][name]["loss"], rel=1e-4)
