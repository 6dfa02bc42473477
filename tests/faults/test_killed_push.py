"""`hf-unlearn push` killed at ten moments of its talk with the Hub: nothing or all of it is there, and a later push succeeds."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from interpreters import Interpreters, Process
from results import make_results, with_hub_base
from upload_hub import TOKEN, UploadHub


REPOSITORY = "me/forgetful"
PUSH = """
import sys
from huggingface_hub import constants
from hf_unlearn.cli import main

constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True  # read when they were imported
sys.exit(main(["push", *sys.argv[1:]]))
"""
MOMENTS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A forget model in several files."""
    folder = tmp_path_factory.mktemp("results")
    return with_hub_base(make_results(folder)["forget-model"], folder / "hub-model")


def push(interpreters: Interpreters, hub: UploadHub, model: Path, *options: str) -> Process:
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    arguments = ("--model", model, "--repo_id", REPOSITORY, *options)
    return interpreters.start("-c", PUSH, *arguments, environment=environment)


@pytest.fixture(scope="module")
def undisturbed(interpreters, model) -> UploadHub:
    """A Hub that has got all."""
    with UploadHub() as hub:
        process = push(interpreters, hub, model)
        assert process.wait() == 0, process.output
    assert len(hub.requests) >= MOMENTS and len(hub.files(REPOSITORY)) > 6
    return hub


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed(moment, interpreters, undisturbed, model):
    content = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    number = 1 + moment * (len(undisturbed.requests) - 1) // (MOMENTS - 1)  # the first request to the last
    with UploadHub() as hub:
        process = push(interpreters, hub, model)
        process.wait_until(lambda: len(hub.requests) >= number)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0), process.output  # 0: it was done already
        there = hub.files(REPOSITORY) if REPOSITORY in hub.repositories else {}
        assert there in ({}, undisturbed.files(REPOSITORY))
        process = push(interpreters, hub, model)
        if process.wait() == 2:
            assert there and "--overwrite" in process.output, process.output
            process = push(interpreters, hub, model, "--overwrite")
        assert process.wait() == 0, process.output
        assert hub.files(REPOSITORY) == undisturbed.files(REPOSITORY)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == content
