"""What becomes a request, and what is refused."""

from __future__ import annotations

import json
import shutil
import stat

import pytest
import torch
from ledger_adapters import ROWS, contents, filled, save_adapter
from tiny import tiny_llama

from hf_unlearn import Ledger, UnlearningError
from hf_unlearn.extrapolation import SafetensorsCheckpoint, average, fingerprint_files, save_forget_adapter
from hf_unlearn.requests.records import next_id, parse_date


class TestAdd:
    def test_record(self, adapters, tmp_path):
        ledger = Ledger.open(tmp_path / "new" / "ledger", create=True)
        options = {"date": "2026-11-25T01:30:00+02:00", "note": "ticket 7"}
        first = ledger.add(adapters["A"], 1, **options)
        second = ledger.add(adapters["B"], 2.5, date="2026-11-24")
        assert (first.id, second.id) == ("2026-11-24-001", "2026-11-24-002")
        again = Ledger.open(ledger.folder)
        assert [request.to_dict() for request in again.requests] == [first.to_dict(), second.to_dict()]
        record = again[first.id]
        assert record.date == "2026-11-24T23:30:00+00:00" and record.note == "ticket 7" and record.is_active
        assert record.data["rows"] == 1 and record.alpha == 1 and record.rows is None
        assert stat.S_IMODE(ledger.folder.stat().st_mode) == 0o700
        assert {path.name for path in (ledger.folder / "requests" / first.id).iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "unlearning.json", "README.md",
        }  # fmt: skip
        assert "keep this folder private" in (ledger.folder / "README.md").read_text()

    def test_rows_are_kept_only_if_asked(self, adapters, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, ROWS["B"])))
        ledger = filled(tmp_path / "ledger", adapters, "A")
        ledger.add(adapters["B"], 1, id="B", forget_dataset=str(path))
        secret = ROWS["B"][0]["completion"].strip().encode()
        assert all(secret not in content for name, content in contents(ledger.folder).items() if "requests" in name)
        assert ledger.rows("B")["completion"][:] == [row["completion"] for row in ROWS["B"]]
        assert ledger.rows("A")["prompt"][:] == [row["prompt"] for row in ROWS["A"]]
        path.write_text(json.dumps(ROWS["C"][0]))
        with pytest.raises(UnlearningError, match="1 rows are not those of the request B"):
            ledger.rows("B")

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"id": "a"}, "has a request a already"),
            ({"id": "../x"}, "'../x' is not possible"),
            ({"date": "yesterday"}, "not ISO 8601"),
            ({"alpha": 0}, "alpha=0"),
            ({"adapter": "A", "id": "D"}, r"This adapter.*is in the ledger as A \(active\).*revoke and purge"),
            ({"forget_dataset": ROWS["C"]}, "3 rows with another SHA-256"),
            ({"forget_dataset": ROWS["B"]}, "held in memory"),
            ({"keep_rows": True}, "--forget_dataset"),
        ],
    )
    def test_refused(self, adapters, tmp_path, options, named):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        before = contents(ledger.folder)
        options = {"adapter": "B", "alpha": 1.0} | options
        with pytest.raises(UnlearningError, match=named):
            ledger.add(adapters[options.pop("adapter")], **options)
        assert contents(ledger.folder) == before

    def test_the_same_rows_twice(self, adapters, tiny_model_dir, tmp_path):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        other = save_adapter(tiny_model_dir, tmp_path / "other", 9, ROWS["A"])
        with pytest.raises(UnlearningError, match=r"same rows is in the ledger as A \(active\)"):
            ledger.add(other, 1)
        ledger.revoke("A", "trained badly")
        with pytest.raises(UnlearningError, match="requests restore A"):
            ledger.add(other, 1)
        ledger.purge("A")
        assert ledger.add(other, 1, id="A-2").is_active

    def test_another_base(self, adapters, tiny_model_dir, tmp_path):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        tiny_llama(seed=3).save_pretrained(tmp_path / "other")
        foreign = save_adapter(tmp_path / "other", tmp_path / "foreign", 3)
        with pytest.raises(UnlearningError, match="another base than .*none on a model that was built from it"):
            ledger.add(foreign, 1)
        moved = shutil.copytree(tiny_model_dir, tmp_path / "moved")
        assert ledger.add(save_adapter(moved, tmp_path / "same", 4), 1).is_active  # the same weights elsewhere

    def test_base_in_another_precision(self, adapters, tiny_model_dir, tmp_path):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        for seed, fits in ((3, False), (0, True)):
            folder = tmp_path / f"bf16-{seed}"
            tiny_llama(seed=seed).to(torch.bfloat16).save_pretrained(folder)
            record = {"base": {"id": str(folder), "fingerprint": fingerprint_files(SafetensorsCheckpoint(folder))}}
            adapter = save_adapter(tiny_model_dir, tmp_path / f"adapter-{seed}", 30 + seed, record=record)
            if fits:
                assert ledger.add(adapter, 1).is_active
            else:
                with pytest.raises(UnlearningError, match="cannot be added: This is not the base model"):
                    ledger.add(adapter, 1)

    def test_without_a_record(self, adapters, tiny_model_dir, tmp_path, caplog):
        bare = save_adapter(tiny_model_dir, tmp_path / "bare", 5)
        (bare / "unlearning.json").unlink()
        ledger = Ledger.open(tmp_path / "ledger", create=True)
        assert ledger.add(bare, 1).num_rows is None
        assert "no fingerprint of its base" in caplog.text and "number of rows is not known" in caplog.text
        assert ledger.base["fingerprint"] == fingerprint_files(SafetensorsCheckpoint(tiny_model_dir))
        assert ledger.add(adapters["A"], 1, id="A").is_active
        stranger = save_adapter(tiny_model_dir, tmp_path / "stranger", 6, base_model_name_or_path="someone/else")
        config = json.loads((stranger / "adapter_config.json").read_text()) | {
            "base_model_name_or_path": "someone/else"
        }
        (stranger / "adapter_config.json").write_text(json.dumps(config))
        (stranger / "unlearning.json").unlink()
        with pytest.raises(UnlearningError, match="names someone/else"):
            ledger.add(stranger, 1)
        assert ledger.add(stranger, 1, base=str(tiny_model_dir)).is_active

    def test_results_are_no_memory(self, adapters, tiny_model_dir, tmp_path):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        with pytest.raises(UnlearningError, match="is a forget adapter"):
            ledger.add(save_forget_adapter(adapters["B"], 1, tmp_path / "forget"), 1)
        by_npo = save_adapter(tiny_model_dir, tmp_path / "npo", 7, record={"method": "npo"})
        with pytest.raises(UnlearningError, match="is by `npo`"):
            ledger.add(by_npo, 1)

    def test_combined_adapters(self, adapters, tmp_path, caplog):
        ledger = filled(tmp_path / "ledger", adapters, "A")
        average([adapters["B"], adapters["C"]]).save(tmp_path / "mean")
        assert ledger.add(tmp_path / "mean", 1, id="mean").num_rows == len(ROWS["B"])
        assert "combination of adapters (average)" in caplog.text
        average([average([adapters["C"], adapters["A"]]).save(tmp_path / "inner"), adapters["B"]]).save(
            tmp_path / "nest"
        )
        with pytest.raises(UnlearningError, match="or one it was combined from, is in the ledger as A"):
            ledger.add(tmp_path / "nest", 1)

    def test_a_folder_of_something_else(self, adapters, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UnlearningError, match=r"no ledger.*holds .*notes.txt"):
            Ledger.open(tmp_path, create=True).add(adapters["A"], 1)
        assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]
        with pytest.raises(UnlearningError, match="holds no ledger"):
            Ledger.open(tmp_path / "none")

    @pytest.mark.parametrize(
        ("text", "named"),
        [("{", "damaged"), ('{"format": 9, "base": null, "requests": []}', "format 9"), ("[]", "damaged")],
    )
    def test_a_damaged_index(self, ledger, text, named):
        (ledger.folder / "requests.json").write_text(text)
        with pytest.raises(UnlearningError, match=named):
            Ledger.open(ledger.folder)


def test_ids_and_dates():
    taken = ["2026-11-25-001", "2026-11-25-003", "2026-11-24-002"]
    assert next_id("2026-11-25T10:00:00+00:00", taken) == "2026-11-25-002"
    assert next_id("2026-11-24", taken) == "2026-11-24-001"
    assert parse_date("2026-11-25") == "2026-11-25T00:00:00+00:00"
    assert parse_date("2026-11-25T23:30:00-01:00") == "2026-11-26T00:30:00+00:00"
    assert parse_date("2026-11-25T10:00:00Z") == "2026-11-25T10:00:00+00:00"
