"""What the reference says, computed once a row: the same losses, without the reference's forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer
from hf_unlearn.data.pairing import PairedDataset
from hf_unlearn.errors import UnlearningError
from hf_unlearn.trainer import reference_cache
from hf_unlearn.trainer.reference_cache import CachePlan, RowFile, plan_cache


def make_trainer(tmp_path, *, forget=6, retain=5, **options) -> ExtrapolationTrainer:
    args = {
        "output_dir": str(tmp_path / "run"),
        "preset": "paper",
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ExtrapolationTrainer(
        model=tiny_llama(),
        args=ExtrapolationConfig(**args | options),
        forget_dataset=tiny_rows(forget, seed=1),
        retain_dataset=tiny_rows(retain, seed=2),
        processing_class=tiny_tokenizer(),
    )


def train(trainer: ExtrapolationTrainer) -> tuple[list[dict], list[list[int]]]:
    """The logs of a run, and the rows of each pass of the reference."""
    passes = []
    original = trainer._reference_pass

    def record(model, rows):
        passes.append(rows.rows.tolist())
        return original(model, rows)

    trainer._reference_pass = record
    trainer.train()
    return [log for log in trainer.state.log_history if "memorization_loss" in log], passes


class TestLosses:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"retain_kl_scale": -1.0},
            {"retain_per_forget": 2},
            {"gradient_accumulation_steps": 2, "gradient_checkpointing": False},
            {"memorization_loss": "npo"},
            {"memorization_loss": "npo", "retain_kl_weight": 0.0},
        ],
        ids=str,
    )
    def test_they_are_those_without_the_cache(self, tmp_path, options):
        expected, _ = train(make_trainer(tmp_path / "without", reference_cache=False, **options))
        logs, _ = train(make_trainer(tmp_path / "with", reference_cache=True, **options))
        assert len(logs) == len(expected) > 3
        for log, other in zip(logs, expected, strict=True):
            for name in ("loss", "memorization_loss", "retain_kl", "retain_token_accuracy", "grad_norm"):
                if name in other:
                    assert log[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
        if options.get("retain_kl_weight") != 0.0:
            assert logs[0]["retain_kl"] == pytest.approx(0, abs=1e-7) and logs[-1]["retain_kl"] > 1e-5

    def test_one_row_once_and_no_reference_forward_in_a_step(self, tmp_path):
        trainer = make_trainer(tmp_path, reference_cache=True, retain_per_forget=2)
        _, passes = train(trainer)
        assert sorted(row for rows in passes for row in rows) == [0, 1, 2, 3, 4]
        assert max(map(len, passes)) == 4  # rows of a step: 2 × 2
        _, passes = train(make_trainer(tmp_path / "without", reference_cache=False))
        assert len(passes) == 9

    def test_npo_caches_the_forget_rows_too(self, tmp_path):
        _, passes = train(make_trainer(tmp_path, reference_cache=True, memorization_loss="npo"))
        assert sorted(row for rows in passes for row in rows) == sorted([*range(5), *range(6)])

    def test_rows_that_the_run_never_meets_are_not_computed(self, tmp_path):
        trainer = make_trainer(tmp_path, reference_cache=True, retain=20, num_train_epochs=1)
        _, passes = train(trainer)
        met = {row["number"] for index in range(6) for row in trainer.train_dataset[index]["retain"]}
        assert {row for rows in passes for row in rows} == met and len(met) == 6

    def test_nothing_is_left_in_the_output_folder(self, tmp_path):
        trainer = make_trainer(tmp_path, reference_cache=True)
        trainer.train()
        assert not list(Path(trainer.args.output_dir).glob(".*"))
        assert trainer.reference_cache is None

    def test_vectors_are_the_hidden_states_of_the_base_model(self, tmp_path):
        trainer = make_trainer(tmp_path, reference_cache=True)
        base, checked = tiny_llama().double(), []
        original = trainer.compute_loss

        def check(model, inputs, *args, **kwargs):
            rows = inputs["rows"][~inputs["is_forget"]].tolist()
            vectors = []
            for row in rows:
                ids, labels = (torch.tensor(trainer.retain_dataset[row][key]) for key in ("input_ids", "labels"))
                hidden = base.model(ids[None]).last_hidden_state[0, :-1]
                vectors.append(hidden[labels[1:] != -100])
            expected = torch.cat(vectors).float()
            found = trainer.reference_cache._files["retain"].read(rows)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            checked.extend(rows)
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = check
        trainer.train()
        assert set(checked) == {0, 1, 2, 3, 4}


class TestRule:
    def test_it_pays_where_every_row_is_met_twice(self):
        rows = {"retain": [0, 1, 2]}
        assert CachePlan(rows, passes=6, num_bytes=10).pays(free_bytes=100)
        assert not CachePlan(rows, passes=5.9, num_bytes=10).pays(free_bytes=100)
        assert not CachePlan(rows, passes=6, num_bytes=11).pays(free_bytes=100)
        assert not CachePlan(rows, passes=6, num_bytes=10, machines=2).pays(free_bytes=100)
        assert CachePlan(rows, passes=12, num_bytes=10, machines=2).pays(free_bytes=100)
        assert not CachePlan({"retain": []}, passes=0, num_bytes=0).pays(free_bytes=100)

    def test_the_plan_counts_rows_passes_and_bytes(self):
        def rows(lengths):  # two tokens of a prompt, then the answer
            return [{"input_ids": [5] * (2 + n), "labels": [-100, -100] + [5] * n} for n in lengths]

        from datasets import Dataset

        pairs = PairedDataset(Dataset.from_list(rows([1, 2])), Dataset.from_list(rows([3, 4, 5])), 2)
        plan = plan_cache(pairs, ["retain", "forget"], epochs=1.5, hidden_size=8)
        assert plan.rows == {"retain": [0, 1, 2], "forget": [0, 1]}
        assert plan.passes == 1.5 * 2 * 2 + 1.5 * 2
        assert plan.num_bytes == 4 * (8 * (3 + 4 + 5) + (1 + 2))

    @pytest.mark.parametrize(("epochs", "used"), [(1, False), (2, True)])
    def test_by_default_it_is_used_where_it_pays(self, tmp_path, epochs, used):
        # 6 forget rows meet 5 retain rows: 6 passes in one epoch, 12 in two
        _, passes = train(make_trainer(tmp_path, num_train_epochs=epochs))
        assert len(passes) == 3  # steps of the only epoch, or ⌈5 / 2⌉ batches
        assert (sum(map(len, passes)) == 5) == used

    def test_by_default_it_leaves_the_disk_alone_where_that_is_nearly_full(self, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_unlearn.trainer.asks_reference.free_disk", lambda folder: 1000)
        _, passes = train(make_trainer(tmp_path))
        assert len(passes) == 9

    def test_without_room_a_cache_that_was_asked_for_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(reference_cache, "free_disk", lambda folder: 1000)
        trainer = make_trainer(tmp_path, reference_cache=True)
        with pytest.raises(UnlearningError, match=r"`reference_cache` needs [\d,]+ bytes .* 1,000 free"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_without_a_reference_there_is_nothing_to_cache(self, tmp_path):
        _, passes = train(make_trainer(tmp_path, reference_cache=True, retain_kl_weight=0.0))
        assert passes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_file_keeps_rows_of_any_length_in_any_order(tmp_path, dtype):
    lengths = {7: 2, 3: 1, 9: 3}
    vectors = {row: torch.randn(length, 5).to(dtype) for row, length in lengths.items()}
    RowFile.reserve(tmp_path / "file", 6 * 5 * dtype.itemsize)
    file = RowFile(tmp_path / "file", lengths, 5, dtype)
    file.write([9, 7], torch.cat([vectors[9], vectors[7]]))
    file.write([3], vectors[3])
    other = RowFile(tmp_path / "file", lengths, 5, dtype)  # another process
    assert other.read([3, 9, 7, 3]).equal(torch.cat([vectors[row] for row in (3, 9, 7, 3)]))
    assert (tmp_path / "file").stat().st_size == 6 * 5 * dtype.itemsize
