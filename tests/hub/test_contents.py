"""What is uploaded of a folder, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from results import BASE, COMMIT, MARKER, SECRET_FILES, with_hub_base

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import read_provenance, write_provenance
from hf_unlearn.hub.contents import ForgetResult, base_on_hub, is_uploaded_name


@pytest.fixture
def model(results, tmp_path):
    return with_hub_base(results["forget-model"], tmp_path / "model")


@pytest.fixture
def adapter(results, tmp_path):
    return with_hub_base(results["forget-adapter"], tmp_path / "adapter")


def rewrite(folder, **changes) -> None:
    write_provenance(folder, read_provenance(folder) | changes)


def content(files, name) -> dict:
    return json.loads(files[name])


class TestFiles:
    def test_of_a_model(self, model):
        shards = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]
        expected = {
            "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "unlearning.json",
            "model.safetensors.index.json", *shards,
        }  # fmt: skip
        assert ForgetResult.load(model, "model").files().keys() == expected

    def test_of_an_adapter(self, adapter):
        expected = {"adapter_model.safetensors", "adapter_config.json", "unlearning.json"}
        assert ForgetResult.load(adapter, "adapter").files().keys() == expected

    def test_all_others_are_named(self, model):
        result = ForgetResult.load(model, "model")
        top = {f"{name.split('/')[0]}/" if "/" in name else name for name in SECRET_FILES}
        assert set(result.left_out(result.files())) == top

    def test_tokenizer_files_and_templates(self, model):
        names = ("merges.txt", "vocab.json", "spiece.model", "own.tiktoken", "chat_template.jinja")
        for name in names:
            (model / name).write_text("{}")
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool.jinja").write_text("t")
        (model / "additional_chat_templates" / "rows.jsonl").write_text(MARKER)
        files = ForgetResult.load(model, "model").files()
        assert files.keys() >= {*names, "additional_chat_templates/tool.jinja"}
        assert "additional_chat_templates/rows.jsonl" not in files

    def test_every_uploaded_name_may_be_deleted_by_the_next_upload(self, model, adapter):
        for folder, kind in ((model, "model"), (adapter, "adapter")):
            for name in ForgetResult.load(folder, kind).files():
                assert is_uploaded_name(name)
                assert is_uploaded_name(f"adapter/{name}")
        for name in (".gitattributes", "picture.png", "onnx/model.safetensors", "LICENSE", "adapter/notes.md"):
            assert not is_uploaded_name(name)


class TestScrubbing:
    def test_the_adapter_names_its_base_on_the_hub(self, adapter):
        config = content(ForgetResult.load(adapter, "adapter").files(), "adapter_config.json")
        assert (config["base_model_name_or_path"], config["revision"]) == (BASE, COMMIT)
        assert (config["r"], config["lora_alpha"]) == (4, 8)

    def test_a_base_that_is_named_has_no_known_revision(self, results):
        files = ForgetResult.load(results["forget-adapter"], "adapter").files("lab/base")
        config = content(files, "adapter_config.json")
        assert (config["base_model_name_or_path"], config["revision"]) == ("lab/base", None)
        assert content(files, "unlearning.json")["base"]["id"] == "lab/base"

    def test_the_record(self, adapter):
        rewrite(
            adapter,
            operator={"name": "requests", "requests": [{"id": MARKER}], "sources": [{"id": "/home/me/run"}]},
            note=MARKER,
        )
        record = content(ForgetResult.load(adapter, "adapter").files(), "unlearning.json")
        original = read_provenance(adapter)
        assert record["operator"] == "requests"
        assert record["data"] == {"forget": {"rows": 6}, "retain": {"rows": 4}}
        assert record["adapter"] == {"sha256": original["adapter"]["sha256"]}
        for name in ("method", "kind", "alpha", "dtype", "realised_error", "versions"):
            assert record[name] == original[name]
        assert MARKER not in json.dumps(record)
        assert "/" not in json.dumps(record).replace(BASE, "")

    def test_paths_in_settings(self, model):
        path = model / "config.json"
        config = json.loads(path.read_text())
        extra = {
            "_name_or_path": "runs/base",
            "text_config": {"_name_or_path": "x", "hidden_size": 1},
            "kept": "/think",
            "cache": ["C:\\Users\\me\\x", "~/y", "/data/me/z", "</s>"],
        }
        path.write_text(json.dumps(config | extra))
        files = ForgetResult.load(model, "model").files()
        assert content(files, "config.json") == config | {
            "text_config": {"hidden_size": 1}, "kept": "/think", "cache": ["</s>"],
        }  # fmt: skip
        assert content(files, "tokenizer_config.json").keys().isdisjoint({"name_or_path", "vocab_file"})

    def test_code_stays_with_the_base(self, model):
        path = model / "config.json"
        automatic = {"AutoModel": "modeling_own.Own", "AutoTokenizer": [None, "a/b--tok.Own"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": automatic}))
        config = content(ForgetResult.load(model, "model").files(), "config.json")
        assert config["auto_map"] == {
            "AutoModel": f"{BASE}--modeling_own.Own", "AutoTokenizer": [None, "a/b--tok.Own"],
        }  # fmt: skip


class TestRefused:
    def test_a_memorising_adapter(self, results):
        with pytest.raises(UnlearningError, match="memorising adapter.*extrapolate"):
            ForgetResult.load(results["memorising"], "adapter")

    def test_a_memorising_adapter_under_another_record(self, results, adapter):
        shutil.copy(results["memorising"] / "adapter_model.safetensors", adapter)
        with pytest.raises(UnlearningError, match="is the memorising adapter itself"):
            ForgetResult.load(adapter, "adapter")

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"method": "npo", "kind": "adapter"}, "npo"),
            ({"kind": "forget-model"}, "--model"),
            ({"alpha": None}, "says no α"),
        ],
    )
    def test_other_records(self, adapter, changes, named):
        rewrite(adapter, **changes)
        with pytest.raises(UnlearningError, match=named):
            ForgetResult.load(adapter, "adapter")

    def test_no_record(self, adapter):
        (adapter / "unlearning.json").unlink()
        with pytest.raises(UnlearningError, match=r"unlearning\.json"):
            ForgetResult.load(adapter, "adapter")

    def test_no_folder(self, tmp_path):
        with pytest.raises(UnlearningError, match="--model .*nowhere"):
            ForgetResult.load(tmp_path / "nowhere", "model")

    def test_a_shard_that_is_missing(self, model):
        (model / "model-00003-of-00006.safetensors").unlink()
        with pytest.raises(UnlearningError, match="model-00003-of-00006"):
            ForgetResult.load(model, "model")

    def test_an_index_that_leads_elsewhere(self, model):
        path = model / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": {"w": "../memorising/adapter_model.safetensors"}}))
        with pytest.raises(UnlearningError, match=r"\.\./memorising"):
            ForgetResult.load(model, "model")


class TestBase:
    @pytest.mark.parametrize(
        "recorded",
        [{"id": "/home/me/base", "revision": COMMIT}, {"id": "runs/base", "revision": None}, {"id": None}, {}],
    )
    def test_a_local_base_needs_a_name(self, recorded):
        with pytest.raises(UnlearningError, match="--base_model"):
            base_on_hub(recorded)
        assert base_on_hub(recorded, "org/name") == ("org/name", None)

    def test_the_recorded_base(self):
        recorded = {"id": BASE, "revision": COMMIT}
        assert base_on_hub(recorded) == base_on_hub(recorded, BASE) == (BASE, COMMIT)

    @pytest.mark.parametrize("name", ["/home/me/base", "./base", "a/b/c", "exists/here"])
    def test_a_name_that_is_a_path(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "exists" / "here").mkdir(parents=True)
        with pytest.raises(UnlearningError, match="--base_model"):
            base_on_hub({}, name)
