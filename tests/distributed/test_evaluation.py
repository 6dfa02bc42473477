"""Five rows a set on two real processes (gloo, CPU) against one."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("evaluate_tiny.py")


@pytest.fixture(scope="module")
def runs(interpreters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    one = runpy.run_path(str(SCRIPT))["evaluate"](folder / "one")
    (folder / "two").mkdir()
    interpreters.launch(SCRIPT, folder / "two")
    return folder, one, [json.loads((folder / "two" / f"facts-{rank}.json").read_text()) for rank in range(2)]


def test_it_really_was_two_processes(runs):
    _, _, two = runs
    assert [facts["processes"] for facts in two] == [2, 2]
    assert {facts["distributed_type"] for facts in two} == {"DistributedType.MULTI_CPU"}


@pytest.mark.parametrize("key", ["evaluations", "different_caches", "automatic_batches"])
def test_all_processes_get_all_that_one_gets(runs, key):
    _, one, two = runs
    assert two[0][key] == two[1][key]
    for expected, evaluation in zip(one[key], two[0][key], strict=True):
        assert set(evaluation["rows"]) == {"forget", "retain", "holdout"}
        assert evaluation["answers"] == expected["answers"]
        assert {len(answers) for answers in evaluation["answers"].values()} == {5}
        for name, columns in expected["rows"].items():
            for column, values in columns.items():
                result = evaluation["rows"][name][column]
                assert len(result) == 5
                assert result == (values if column == "ground_truth" else pytest.approx(values, abs=1e-5)), column
        for name, figure in expected["figures"].items():
            value = figure["value"]
            result = evaluation["figures"][name]["value"]
            assert result == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), name
    assert two[0]["no_rows"] == two[1]["no_rows"] == []


def test_the_processes_share_the_rows(runs):
    _, one, two = runs
    for key in ("computed", "computed_automatic"):
        for facts in two:
            assert 0.2 * one[key] < facts[key] < 0.8 * one[key]
    assert sum(facts["computed"] for facts in two) >= one["computed"]


def test_each_process_has_its_cache_file_and_reads_both(runs):
    folder, one, two = runs

    def keys(run: str) -> list[set[str]]:
        files = sorted((folder / run / "cache-1").iterdir())
        assert [file.name for file in files] == [f"process{rank}.jsonl" for rank in range(len(files))]
        return [{key for line in file.read_text().splitlines() for key in json.loads(line)} for file in files]

    first, second = keys("two")
    assert first and second and not first & second
    assert [first | second] == keys("one")
    for facts in [one, *two]:
        assert facts["computed_again"] == 0
        assert facts["from_cache"] == facts["evaluations"]
