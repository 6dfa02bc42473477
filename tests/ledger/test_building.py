"""The built model is the sum of the active requests, whatever happened before."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from ledger_adapters import ALPHAS, built, check_equal, contents, dense, filled
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_unlearn import Ledger, UnlearningError
from hf_unlearn.extrapolation import read_provenance


class TestBuild:
    @pytest.mark.parametrize("ids", ["A", "BC", "ABC"])
    def test_it_is_the_sum_of_the_products(self, ledger, adapters, tiny_model_dir, tmp_path, ids):
        model = built(ledger, tmp_path / "model", only=list(ids))
        base = load_file(tiny_model_dir / "model.safetensors")
        wanted = {name: tensor.double() for name, tensor in base.items()}
        for id in ids:
            for name, update in dense(adapters[id]).items():
                wanted[name] = wanted[name] - ALPHAS[id] * update
        assert model.keys() == base.keys()
        changed = {name for id in ids for name in dense(adapters[id])}
        for name, tensor in model.items():
            torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-6, rtol=0)
            assert torch.equal(tensor, base[name]) == (name not in changed)

    def test_order_does_not_matter(self, ledger, adapters, tmp_path):
        wanted = built(ledger, tmp_path / "ABC")
        for order in map("".join, itertools.permutations("ABC")):
            other = filled(tmp_path / f"ledger-{order}", adapters, order)
            assert [request.id for request in other.requests] == list(order)
            check_equal(built(other, tmp_path / f"model-{order}"), wanted)

    def test_revoked_is_as_if_never_added(self, ledger, adapters, tmp_path):
        before = built(ledger, tmp_path / "before")
        ledger.revoke("B", "withdrawn")
        without = built(ledger, tmp_path / "revoked")
        check_equal(without, built(filled(tmp_path / "scratch", adapters, "CA"), tmp_path / "never"))
        assert not torch.equal(
            without["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
        )
        ledger.restore("B")
        check_equal(built(ledger, tmp_path / "restored"), before)
        check_equal(built(ledger, tmp_path / "left-out", without=["B"]), without)

    def test_adapter_and_live_sum_agree_with_the_model(self, ledger, tiny_model_dir, tmp_path):
        ledger.build(tmp_path / "adapter", format="adapter")
        built(ledger, tmp_path / "model")
        ids = torch.arange(4, 24).reshape(2, 10)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        before = base(ids).logits.detach()
        wrapped = PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(wrapped(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
        assert (model(ids).logits - before).abs().max() > 0.01
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        ranks = {config["r"], *config["rank_pattern"].values()}
        assert ranks == {4 + 2, 4 + 3, 2 + 3}

    def test_provenance(self, ledger, tiny_model_dir, tmp_path):
        built(ledger, tmp_path / "model", without=["C"], dtype="bfloat16")
        record = read_provenance(tmp_path / "model")
        assert record["kind"] == "forget-model" and record["dtype"] == "bfloat16" and record["alpha"] == 1
        assert record["base"]["id"] == str(tiny_model_dir)
        assert record["base"]["fingerprint"] == ledger.base["fingerprint"] is not None
        assert record["operator"]["name"] == "requests"
        assert [(r["id"], r["alpha"], r["rows"]) for r in record["operator"]["requests"]] == [
            ("A", 1.5, 1),
            ("B", 0.5, 3),
        ]
        assert ledger["A"].data["sha256"] not in json.dumps(record)  # which would confirm a guess of a single row

    def test_refused(self, ledger, tmp_path):
        before = contents(ledger.folder)
        for options, named in [
            ({"only": ["D"]}, "no request 'D'. Its requests: A, B, C"),
            ({"only": ["A"], "without": ["B"]}, "exclude each other"),
            ({"without": ["A", "B", "C"]}, "No active request"),
            ({"format": "gguf"}, "'gguf'"),
            ({"format": "adapter", "dtype": "bfloat16"}, "--dtype"),
        ]:
            with pytest.raises(UnlearningError, match=named):
                ledger.build(tmp_path / "out", **options)
            assert not (tmp_path / "out").exists()
        for output in (ledger.folder, ledger.folder.parent, ledger.folder / "requests" / "A", ledger.folder / "model"):
            for format in ("model", "adapter"):
                with pytest.raises(UnlearningError, match="is in the ledger or holds it"):
                    ledger.build(output, format=format, overwrite=True)
        assert contents(ledger.folder) == before
        for id in "ABC":
            ledger.revoke(id, "withdrawn")
        with pytest.raises(UnlearningError, match="No active request"):
            ledger.build(tmp_path / "out")
        with pytest.raises(UnlearningError, match="B is revoked"):
            ledger.build(tmp_path / "out", only=["B"])

    def test_another_base_is_refused(self, ledger, tmp_path):
        tiny_llama(seed=5).save_pretrained(tmp_path / "other")
        with pytest.raises(UnlearningError, match="not the base model"):
            ledger.build(tmp_path / "out", base=str(tmp_path / "other"))

    def test_a_changed_adapter_is_refused(self, ledger, tmp_path):
        path = ledger.folder / "requests" / "A" / "adapter_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 1  # a bit of the last number
        path.write_bytes(content)
        with pytest.raises(UnlearningError, match="not the file that was added as A"):
            ledger.build(tmp_path / "out")
        path.unlink()
        with pytest.raises(UnlearningError, match="adapter of the request A is gone"):
            ledger.build(tmp_path / "out")


class TestChanges:
    def test_history(self, ledger):
        ledger.revoke("B", "withdrawn")
        ledger.restore("B")
        ledger.revoke("B", "again")
        events = [(event["event"], event["reason"]) for event in Ledger.open(ledger.folder)["B"].history]
        assert events == [("added", ""), ("revoked", "withdrawn"), ("restored", ""), ("revoked", "again")]
        assert [request.id for request in Ledger.open(ledger.folder).active()] == ["A", "C"]

    def test_purge(self, ledger, tmp_path):
        folder = ledger.folder / "requests" / "B"
        with pytest.raises(UnlearningError, match="B is active.*Revoke it first"):
            ledger.purge("B")
        assert folder.is_dir()
        ledger.revoke("B", "withdrawn")
        before = built(ledger, tmp_path / "before")
        ledger.purge("B")
        assert not folder.exists() and ledger["B"].purged and ledger["B"].data["rows"] == 3
        for change in (ledger.restore, ledger.purge):
            with pytest.raises(UnlearningError, match="purged"):
                change("B")
        check_equal(built(ledger, tmp_path / "after"), before)

    def test_refused(self, ledger):
        with pytest.raises(UnlearningError, match="active already"):
            ledger.restore("A")
        with pytest.raises(UnlearningError, match="needs a reason"):
            ledger.revoke("A", " ")
        ledger.revoke("A", "withdrawn")
        with pytest.raises(UnlearningError, match="revoked already"):
            ledger.revoke("A", "withdrawn")
