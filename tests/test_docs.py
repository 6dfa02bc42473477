"""The documentation against the code: options and defaults, links, and examples that run."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_unlearn.cli import COMMANDS, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from hf_unlearn.cli.audit import AuditArguments
from hf_unlearn.cli.combine import CombineArguments
from hf_unlearn.cli.completion import CompletionArguments
from hf_unlearn.cli.eval import EvalArguments
from hf_unlearn.cli.export import ExportArguments
from hf_unlearn.cli.extrapolate import ExtrapolateArguments
from hf_unlearn.cli.outputs import OUTPUTS
from hf_unlearn.cli.parser import _own_fields
from hf_unlearn.cli.playground import PlaygroundArguments
from hf_unlearn.cli.push import PushArguments
from hf_unlearn.cli.quickstart import QuickstartArguments
from hf_unlearn.cli.requests import ACTIONS
from hf_unlearn.cli.sample import SampleArguments
from hf_unlearn.cli.sweep import SweepArguments
from hf_unlearn.cli.train_options import SHOWN, LoraModelConfig, TrainArguments
from hf_unlearn.data import to_prompt_completion
from hf_unlearn.evaluation import metrics
from hf_unlearn.evaluation.aggregates import ATTACKS, MEANS, RATES
from hf_unlearn.evaluation.logs import HEADLINES
from hf_unlearn.evaluation.metrics import RougeScores
from hf_unlearn.trainer import ExtrapolationConfig
from hf_unlearn.trainer.extrapolation_config import DEFAULTS, PRESETS
from hf_unlearn.trainer.extrapolation_trainer import MIRROR


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "recipes" / "README.md"]
OPTIONS = {
    "quickstart": [QuickstartArguments],
    "sample": [SampleArguments],
    "train": [TrainArguments, ExtrapolationConfig, LoraModelConfig],
    "eval": [EvalArguments],
    "audit": [AuditArguments],
    "sweep": [SweepArguments],
    "extrapolate": [ExtrapolateArguments],
    "export": [ExportArguments],
    "combine": [CombineArguments],
    "completion": [CompletionArguments],
    "push": [PushArguments],
    "playground": [PlaygroundArguments],
    "requests": [kind for _, kind, _, _ in ACTIONS.values()],
}
PAGE_OF = {
    "eval": "evaluate",
    "combine": "operators",
    "push": "hub",
    "export": "serving",
    "completion": "conventions",
}  # command: its page, where that has another name
OPTION_ROW = re.compile(r"^\| `--(?P<name>\w+)` \| (?P<default>[^|]+) \|", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def options_of(command: str) -> list[re.Match]:
    """Lines of the option tables on a command's page."""
    return list(OPTION_ROW.finditer(read(ROOT / "docs" / f"{PAGE_OF.get(command, command)}.md")))


def blocks(page: Path, language: str) -> list[str]:
    return [match["code"] for match in FENCE.finditer(read(page)) if match["language"] == language]


def shown_default(value: Any) -> str:
    """A default as the tables write it."""
    if value is None:
        return "–"
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, list):
        return f"`{' '.join(shown_default(item).strip('`') for item in value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


class TestOptions:
    def test_every_command_has_a_page(self):
        assert OPTIONS.keys() == COMMANDS.keys()

    @pytest.mark.parametrize("command", OPTIONS)
    def test_tables_give_the_defaults_of_the_code(self, command):
        fields = {field.name: field for kind in OPTIONS[command] for field in dataclasses.fields(kind)}
        rows = options_of(command)
        assert rows
        for row in rows:
            assert row["name"] in fields, row["name"]
            assert row["default"].strip() == shown_default(default_of(fields[row["name"]])), row["name"]

    @pytest.mark.parametrize("command", OPTIONS)
    def test_tables_are_complete(self, command):
        documented = [row["name"] for row in options_of(command)]
        own = {field.name for kind in OPTIONS[command] for field in _own_fields(kind)}
        expected = own | SHOWN if command == "train" else own
        assert sorted(documented) == sorted(expected)

    def test_levers_of_the_readme(self):
        defaults = {field.name: default_of(field) for field in dataclasses.fields(ExtrapolationConfig)}
        defaults |= DEFAULTS | {"retain_kl_scale": MIRROR}  # where none is given
        quickstart = {field.name: default_of(field) for field in dataclasses.fields(QuickstartArguments)}
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", read(ROOT / "README.md"), re.MULTILINE)
        assert len(rows) == 5
        for name, paper, default in rows:
            assert float(default.replace("−", "-")) == defaults[name], name
            assert float(paper) == PRESETS["paper"].get(name, float(paper)), name
            assert quickstart.get(name, defaults[name]) == defaults[name], name

    def test_exit_codes(self):
        rows = re.findall(r"^\| (\d+) \|", read(ROOT / "docs" / "index.md"), re.MULTILINE)
        assert list(map(int, rows)) == [EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED]


class TestFigures:
    PAGE = "docs/evaluate.md"

    def test_every_figure_and_column_is_defined(self):
        defined = set(re.findall(r"`([^`\n]+)`", read(ROOT / self.PAGE)))
        for name in {*MEANS, *(f"{rate}_rate" for rate in RATES), "perplexity", "truth_ratio", *ATTACKS, *HEADLINES}:
            assert name in defined, name
        columns = set(ATTACKS.values()) - {"reference_score", "gradnorm_score"}
        for name in {*MEANS, *RATES, *columns, *RougeScores._fields, "num_tokens", "wrong_losses", "paraphrased_loss"}:
            assert name in defined, name

    def test_every_metric_file_is_listed(self):
        files = {path.name for path in Path(metrics.__file__).parent.glob("*.py")} - {"__init__.py", "info.py"}
        assert files == set(re.findall(r"`(\w+\.py)`", read(ROOT / self.PAGE)))

    def test_every_output_is_listed(self):
        for name in (*OUTPUTS, "TOFU_EVAL.json"):
            assert f"`{name}`" in read(ROOT / self.PAGE), name


class TestLinks:
    @staticmethod
    def anchors(page: Path) -> set[str]:
        """Anchors of the headings, as GitHub makes them."""
        headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    @pytest.mark.parametrize("page", PAGES, ids=page_id)
    def test_files_and_sections_exist(self, page):
        for match in LINK.finditer(FENCE.sub("", read(page))):
            path, _, anchor = match["target"].partition("#")
            if path.startswith(("http://", "https://")):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), f"{match['target']} of {page_id(page)}"
            if anchor:
                assert anchor in self.anchors(target), f"{match['target']} of {page_id(page)}"

    def test_every_page_is_in_the_index(self):
        index = read(ROOT / "docs" / "index.md")
        for page in (ROOT / "docs").rglob("*.md"):
            assert page.name == "index.md" or f"({page.relative_to(ROOT / 'docs').as_posix()})" in index


class TestExamples:
    @pytest.mark.parametrize("page", PAGES, ids=page_id)
    def test_they_compile(self, page):
        for number, code in enumerate(blocks(page, "python")):
            compile(code, f"{page_id(page)}, example {number}", "exec")

    @pytest.mark.parametrize(
        "names", [["README.md"], ["docs/python.md", "docs/extrapolate.md"], ["docs/evaluate.md"]], ids=" ".join
    )
    @pytest.mark.usefixtures("evaluate_caches")
    def test_they_run_in_order(self, names, tiny_model_dir, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "quickstart").mkdir()
        (tmp_path / "quickstart" / "planted-model").symlink_to(tiny_model_dir, target_is_directory=True)
        namespace: dict[str, Any] = {"__name__": "docs"}
        for name in names:
            for number, code in enumerate(blocks(ROOT / name, "python")):
                exec(compile(code, f"{name}, example {number}", "exec"), namespace)

    def test_rows_are_accepted(self):
        rows = blocks(ROOT / "docs" / "data.md", "json")
        assert len(rows) == 7
        for row in rows:
            pairs = to_prompt_completion(datasets.Dataset.from_list([json.loads(row)]), name="example", chat=True)
            assert len(pairs) == 1
