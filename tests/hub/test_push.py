"""Uploads by the real client to a Hub on this machine: what arrives there, and how failures are told."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http
from peft import PeftModel
from results import ALPHA, BASE, COMMIT, MARKER, with_hub_base, write_results
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from upload_hub import TOKEN, Repository

from hf_unlearn.errors import UnlearningError
from hf_unlearn.hub import HubPush, PushError


REPOSITORY = "me/forgetful"


@pytest.fixture
def model(results, tmp_path):
    return with_hub_base(results["forget-model"], tmp_path / "model")


@pytest.fixture
def adapter(results, tmp_path):
    return with_hub_base(results["forget-adapter"], tmp_path / "adapter")


def snapshot(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestUpload:
    def test_a_model(self, hub, model, results, tmp_path):
        before = snapshot(model)
        push = HubPush(REPOSITORY, model=model, results=write_results(tmp_path / "sweep"), forgotten="Two people.")
        assert push.push() == f"{hub.url}/{REPOSITORY}"
        files = hub.files(REPOSITORY)
        assert sorted(files) == [
            "README.md", "config.json", "generation_config.json",
            *(f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)),
            "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "unlearning.json",
        ]  # fmt: skip
        for name in files:
            if name.endswith(".safetensors") or name in ("tokenizer.json", "model.safetensors.index.json"):
                assert files[name] == before[name], name
        assert b"Two people." in files["README.md"]
        repository = hub.repositories[REPOSITORY]
        assert repository.private
        assert [commit["added"] for commit in repository.commits] == [sorted(files)]
        assert repository.commits[0]["summary"] == "Forget model at α = 2"
        assert snapshot(model) == before

    def test_nothing_secret_is_sent(self, hub, model, adapter, results, tmp_path):
        HubPush(REPOSITORY, model=model, adapter=adapter, results=write_results(tmp_path / "sweep")).push()
        sent = bytes(hub.received) + b"".join(hub.files(REPOSITORY).values())
        memorising = (results["memorising"] / "adapter_model.safetensors").read_bytes()
        for secret in (
            MARKER.encode(),
            str(results["base"].parent).encode(),
            str(tmp_path).encode(),
            b"f" * 64,
            memorising,
        ):
            assert secret not in sent
        assert (adapter / "adapter_model.safetensors").read_bytes() in sent

    def test_an_adapter_loads_as_it_was_written(self, hub, adapter, results, tmp_path):
        HubPush(REPOSITORY, adapter=adapter).push()
        files = hub.files(REPOSITORY)
        assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "unlearning.json"]
        (tmp_path / "copy.safetensors").write_bytes(files["adapter_model.safetensors"])
        memorising = load_file(results["memorising"] / "adapter_model.safetensors")
        for name, tensor in load_file(tmp_path / "copy.safetensors").items():
            factor = -ALPHA if "lora_B" in name else 1.0
            assert (tensor == factor * memorising[name]).all(), name

    def test_both(self, hub, model, adapter):
        HubPush(REPOSITORY, model=model, adapter=adapter).push()
        files = hub.files(REPOSITORY)
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/unlearning.json"} == {
            name for name in files if "adapter" in name
        }
        assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == BASE

    def test_what_arrived_loads_and_is_the_result(self, hub, model, adapter, results, tmp_path):
        HubPush(REPOSITORY, model=model, adapter=adapter).push()
        for name, content in hub.files(REPOSITORY).items():
            path = tmp_path / "download" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        ids = torch.tensor([[5, 9, 17, 33]])
        base, forgetful = (
            AutoModelForCausalLM.from_pretrained(folder) for folder in (results["base"], tmp_path / "download")
        )
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(results["base"]), tmp_path / "download", subfolder="adapter"
        )
        with torch.no_grad():
            before, merged, live = (network(ids).logits for network in (base, forgetful, adapted))
        torch.testing.assert_close(live, merged, atol=1e-4, rtol=1e-4)
        assert (merged - before).abs().max() > 0.1
        assert AutoTokenizer.from_pretrained(tmp_path / "download").decode([5]) == "w5"

    def test_the_base_is_asked_for_its_licence(self, hub, model):
        hub.repositories[BASE].branches[COMMIT] = {}
        HubPush(REPOSITORY, model=model).push()
        card = hub.files(REPOSITORY)["README.md"].decode()
        assert "license: apache-2.0" in card
        assert "**The base is public: keep this repository private.**" in card

    def test_a_branch(self, hub, model):
        hub.repositories[REPOSITORY] = Repository()
        hub.repositories[REPOSITORY].branches["main"]["README.md"] = b"the main branch"
        assert (
            HubPush(REPOSITORY, model=model, revision="request-7").push() == f"{hub.url}/{REPOSITORY}/tree/request-7"
        )
        assert hub.files(REPOSITORY) == {"README.md": b"the main branch"}
        assert b"request-7" in hub.files(REPOSITORY, "request-7")["README.md"]
        with pytest.raises(UnlearningError, match="holds files"):
            HubPush(REPOSITORY, model=model, revision="request-7").push()

    def test_a_name_without_namespace_is_the_users(self, hub, adapter):
        assert HubPush("forgetful", adapter=adapter).push() == f"{hub.url}/me/forgetful"
        assert "me/forgetful" in hub.files("me/forgetful")["README.md"].decode()

    def test_an_organisation(self, hub, adapter):
        HubPush("lab/forgetful", adapter=adapter).push()
        assert hub.repositories["lab/forgetful"].private

    def test_public(self, hub, adapter):
        HubPush(REPOSITORY, adapter=adapter, private=False).push()
        assert not hub.repositories[REPOSITORY].private


class TestExisting:
    def test_files_are_not_replaced_unasked(self, hub, adapter):
        HubPush(REPOSITORY, adapter=adapter).push()
        count = len(hub.requests)
        with pytest.raises(UnlearningError, match="--overwrite"):
            HubPush(REPOSITORY, adapter=adapter).push()
        assert set(hub.requests[count:]) == {"whoami", "info"}  # asked, and sent nothing

    def test_what_an_earlier_upload_left_is_deleted(self, hub, model, adapter):
        HubPush(REPOSITORY, model=model).push()
        hub.repositories[REPOSITORY].branches["main"] |= {"picture.png": b"p", "model.safetensors": b"of another hand"}
        HubPush(REPOSITORY, adapter=adapter, overwrite=True).push()
        files = hub.files(REPOSITORY)
        assert sorted(files) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors", "picture.png", "unlearning.json",
        ]  # fmt: skip
        assert "model-00001-of-00006.safetensors" in hub.repositories[REPOSITORY].commits[-1]["deleted"]

    def test_an_empty_repository_is_filled(self, hub, adapter):
        hub.repositories[REPOSITORY] = Repository()
        HubPush(REPOSITORY, adapter=adapter).push()
        assert "create" not in hub.requests

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_public_repository_is_refused(self, hub, adapter, overwrite):
        hub.repositories[REPOSITORY] = Repository(private=False)
        with pytest.raises(UnlearningError, match="is public"):
            HubPush(REPOSITORY, adapter=adapter, overwrite=overwrite).push()
        assert hub.files(REPOSITORY) == {}

    def test_a_change_by_another_hand_stops_the_commit(self, hub, adapter, monkeypatch):
        hub.repositories[REPOSITORY] = repository = Repository()
        shas = iter(["0" * 40] * 9)
        monkeypatch.setattr(
            Repository, "sha", lambda self, branch: next(shas) if hub.requests[-1] == "info" else "1" * 40
        )
        with pytest.raises(PushError, match="something else has changed"):
            HubPush(REPOSITORY, adapter=adapter).push()
        assert repository.commits == []


class TestChecks:
    def test_offline(self, hub, adapter, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UnlearningError, match="HF_HUB_OFFLINE"):
            HubPush(REPOSITORY, adapter=adapter).push()

    def test_no_token(self, hub, adapter, monkeypatch, tmp_path):
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UnlearningError, match="hf auth login"):
            HubPush(REPOSITORY, adapter=adapter).push()
        assert hub.requests == []

    def test_a_token_that_reads(self, hub, adapter):
        hub.user["auth"]["accessToken"]["role"] = "read"
        with pytest.raises(UnlearningError, match="can only read"):
            HubPush(REPOSITORY, adapter=adapter).push()

    @pytest.mark.parametrize(
        ("repo_id", "named"),
        [
            ("others/x", "others.*Choose from: me, lab"),
            ("library/x", "library.*me/x"),
            ("a/b/c", "a/b/c"),
            ("x y", "x y"),
        ],
    )
    def test_namespaces(self, hub, adapter, repo_id, named):
        with pytest.raises(UnlearningError, match=f"--repo_id {named}"):
            HubPush(repo_id, adapter=adapter).push()
        assert set(hub.requests) <= {"whoami"}

    def test_a_token_that_is_passed(self, hub, adapter, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_another")
        HubPush(REPOSITORY, adapter=adapter, token=TOKEN).push()
        assert TOKEN not in HubPush(REPOSITORY, adapter=adapter, token=TOKEN).command()


class TestFailures:
    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch):
        """The client waits longer and longer between its tries."""
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)

    @pytest.mark.parametrize(
        ("route", "failure", "said"),
        [
            ("whoami", 401, r"does not accept the token \(401\).*hf auth login"),
            ("whoami", 500, r"the Hub failed \(500\)"),
            ("info", 403, r"may not do this \(403\)"),
            ("create", 403, r"may not do this \(403\).*write access"),
            ("create", 409, r"at the same time \(409\)"),
            ("create", 429, r"asks for a pause \(429\)"),
            ("validate", 400, r"refused \(400\).*README\.md"),
            ("preupload", 404, r"does not find the repository or branch.*\(404\)"),
            ("preupload", 401, r"does not accept the token \(401\)"),
            ("batch", 403, r"may not do this \(403\)"),
            ("put", 403, r"may not do this \(403\)"),
            ("put", 500, r"the Hub failed \(500\)"),
            ("verify", 404, r"\(404\)"),
            ("commit", 403, r"may not do this \(403\)"),
            ("commit", 409, r"at the same time \(409\)"),
            ("commit", 500, r"the Hub failed \(500\)"),
            ("whoami", "drop", r"the connection to http://127\.0\.0\.1:\d+ failed or broke off"),
            ("put", "drop", r"the connection to http://127\.0\.0\.1:\d+ failed or broke off"),
            ("commit", "drop", r"the connection to http://127\.0\.0\.1:\d+ failed or broke off"),
        ],
    )
    def test_each_is_told_and_can_be_gone_on_from(self, hub, adapter, route, failure, said):
        before = snapshot(adapter)
        hub.failures[route] = failure
        with pytest.raises(PushError, match=f"(?s){said}") as raised:
            HubPush(REPOSITORY, adapter=adapter, forgotten="Two people's facts").push()
        assert snapshot(adapter) == before
        repository = hub.repositories.get(REPOSITORY)
        assert repository is None or repository.commits == []
        assert str(adapter) in str(raised.value)
        arguments = shlex.split(str(raised.value).splitlines()[-1])
        assert arguments == [
            "hf-unlearn", "push", "--adapter", str(adapter), "--repo_id", REPOSITORY, "--forgotten", "Two people's facts",
        ]  # fmt: skip
        hub.failures.clear()
        HubPush(REPOSITORY, adapter=adapter).push()
        assert len(hub.repositories[REPOSITORY].commits) == 1

    def test_what_has_arrived_is_not_sent_again(self, hub, model):
        hub.failures["commit"] = 500
        with pytest.raises(PushError):
            HubPush(REPOSITORY, model=model).push()
        hub.failures.clear()
        hub.requests.clear()
        HubPush(REPOSITORY, model=model).push()
        assert "put" not in hub.requests

    def test_the_storage_of_its_own(self, hub, adapter, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        hub.failures["xet"] = 403
        with pytest.raises(PushError, match=r"may not do this \(403\)"):
            HubPush(REPOSITORY, adapter=adapter).push()
        assert "xet" in hub.requests
