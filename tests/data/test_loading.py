from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from hf_unlearn.data import load_rows
from hf_unlearn.errors import UnlearningError


ROWS = [{"question": "Who?", "answer": "Ada\u2028é"}, {"question": "What, then?", "answer": 'a "poet"\nand more'}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class TestObjects:
    def test_dataset_is_returned_as_it_is(self):
        rows = datasets.Dataset.from_list(ROWS)
        assert load_rows(rows) is rows

    def test_list(self):
        assert load_rows(ROWS).to_list() == ROWS

    def test_list_with_unequal_columns(self):
        assert load_rows([{"text": "a"}, {"text": "b", "wrong_answers": ["c"]}])[1]["wrong_answers"] == ["c"]

    def test_iterable(self):
        rows = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
        assert load_rows(rows).to_list() == ROWS

    @pytest.mark.parametrize(
        ("splits", "split", "expected"),
        [(["test", "train"], None, "train"), (["test"], None, "test"), (["test", "train"], "test", "test")],
    )
    def test_split(self, splits, split, expected):
        sets = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in splits})
        assert load_rows(sets, split=split)[0]["text"] == expected

    @pytest.mark.parametrize("split", [None, "dev"])
    def test_unclear_split(self, split):
        sets = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS) for name in ("one", "two")})
        with pytest.raises(UnlearningError, match=r"forget set .*one, two"):
            load_rows(sets, split=split, name="forget set")

    @pytest.mark.parametrize(
        ("source", "problem"),
        [
            ([], "forget set has no rows"),
            (datasets.Dataset.from_list([]), "forget set has no rows"),
            (None, "forget set is of type NoneType"),
            (["text"], "forget set, row 0: it is of type str"),
            ([{"text": "a"}, {"text": ["b"]}], "forget set mixes types"),
        ],
    )
    def test_refused(self, source, problem):
        with pytest.raises(UnlearningError, match=problem):
            load_rows(source, name="forget set")

    def test_split_of_a_single_set(self):
        with pytest.raises(UnlearningError, match=r"retain set: .*split='dev'.*unset"):
            load_rows(ROWS, split="dev", name="retain set")


class TestFiles:
    @pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows}])
    def test_json(self, tmp_path, wrap):
        assert load_rows(write(tmp_path / "rows.json", json.dumps(wrap(ROWS)))).to_list() == ROWS

    @pytest.mark.parametrize("ending", ["jsonl", "json", "JSONL"])
    def test_json_lines(self, tmp_path, ending):
        lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        assert load_rows(str(write(tmp_path / f"rows.{ending}", lines + "\n"))).to_list() == ROWS

    def test_byte_order_mark(self, tmp_path):
        assert load_rows(write(tmp_path / "rows.jsonl", '\ufeff{"text": "a"}\r\n')).to_list() == [{"text": "a"}]

    def test_csv(self, tmp_path):
        text = 'question,answer\nWho?,Ada\u2028é\n"What, then?","a ""poet""\nand more"\n'
        assert load_rows(write(tmp_path / "rows.csv", text)).to_list() == ROWS

    def test_csv_cells_stay_text(self, tmp_path):
        rows = load_rows(write(tmp_path / "rows.csv", "question,answer\nCode?,007\nName?,None\nAge?,\n"))
        assert rows["answer"][:] == ["007", "None", ""]

    def test_parquet(self, tmp_path):
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
        assert load_rows(tmp_path / "rows.parquet").to_list() == ROWS

    @pytest.mark.parametrize(
        ("file", "text", "problem"),
        [
            ("rows.json", '[\n{"text": "a"},\n{"text": }]', "rows.json is not valid JSON: line 3, column 10"),
            ("rows.json", '{"text": "a"}\n{"text": ', "rows.json is not valid JSON: line 2"),
            ("rows.json", '{"text": "a"}', "rows.json holds no list of rows"),
            ("rows.json", "", "rows.json is not valid JSON: line 1"),
            ("rows.jsonl", '{"text": "a"}\n\n{"text" "b"}\n', "rows.jsonl is not valid JSON: line 3, column 9"),
            ("rows.jsonl", '{"text": "a"}\n"b"\n', "forget set, row 1: it is of type str"),
            ("rows.jsonl", "", "forget set has no rows"),
            ("rows.csv", "question,answer\nWho?,Ada,Bo\n", "rows.csv is not valid CSV: line 2: 2 cells"),
            ("rows.csv", "question,answer\nWho?\n", "rows.csv is not valid CSV: line 2: 2 cells"),
            ("rows.csv", 'question,answer\nWho?,"Ada', "rows.csv is not valid CSV: line 2: unexpected end"),
            ("rows.csv", "question,answer\n", "forget set has no rows"),
            ("rows.parquet", "no parquet", "rows.parquet is not a valid Parquet file"),
            ("rows.xlsx", "x", "rows.xlsx ends in '.xlsx'.*\\.csv"),
            ("rows", "x", "rows ends in 'nothing'"),
        ],
    )
    def test_refused(self, tmp_path, file, text, problem):
        with pytest.raises(UnlearningError, match=problem):
            load_rows(write(tmp_path / file, text), name="forget set")

    def test_not_utf8(self, tmp_path):
        (tmp_path / "rows.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
        with pytest.raises(UnlearningError, match=r"rows.jsonl is not UTF-8 text \(byte 10\)"):
            load_rows(tmp_path / "rows.jsonl")

    @pytest.mark.parametrize("source", ["rows.jsonl", "./rows", "a/b/c", "/rows", Path("rows")])
    def test_missing(self, source):
        with pytest.raises(UnlearningError, match=r"forget set .*rows.* does not exist|a/b/c does not exist"):
            load_rows(source, name="forget set")


class TestFolders:
    def test_saved_set(self, tmp_path):
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
        assert load_rows(tmp_path / "rows").to_list() == ROWS

    def test_saved_splits(self, tmp_path):
        sets = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in ("one", "two")})
        sets.save_to_disk(tmp_path / "rows")
        assert load_rows(tmp_path / "rows", split="two").to_list() == [{"text": "two"}]
        with pytest.raises(UnlearningError, match="one, two"):
            load_rows(tmp_path / "rows")

    def test_data_files(self, tmp_path):
        write(tmp_path / "train.jsonl", '{"text": "a"}\n')
        assert load_rows(str(tmp_path)).to_list() == [{"text": "a"}]

    def test_no_data_files(self, tmp_path):
        with pytest.raises(UnlearningError, match=f"folder {tmp_path} cannot be read"):
            load_rows(tmp_path)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnlearningError, match=r"'nobody/nothing' is no local file or folder.*failed: .*network"):
        load_rows("nobody/nothing", name="forget set")


def test_hub_arguments(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_rows("locuslab/TOFU", config="forget10")
    load_rows("locuslab/TOFU", split="train[:2]")
    assert calls == [
        (("locuslab/TOFU", "forget10"), {"split": "train"}),
        (("locuslab/TOFU", None), {"split": "train[:2]"}),
    ]


@pytest.mark.parametrize("part", ["forget", "retain", "holdout"])
def test_sample_sets(part):
    assert {"question", "answer"} <= set(load_rows(f"people/{part}").column_names)


@pytest.mark.parametrize("source", ["people", "people/other"])
def test_unknown_sample_set(source):
    with pytest.raises(UnlearningError, match="people/forget, people/retain, people/holdout"):
        load_rows(source)
