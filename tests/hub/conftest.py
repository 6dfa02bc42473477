"""A Hub on this machine and results to upload."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants
from results import make_results
from upload_hub import TOKEN, Repository, UploadHub


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> dict[str, Path]:
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture
def hub(monkeypatch):
    """The environment of a user who is logged in; uploads go by LFS, since the Xet storage is not spoken here."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with UploadHub() as hub:
        hub.repositories["org/base"] = Repository(private=False, card_data={"license": "apache-2.0"})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
