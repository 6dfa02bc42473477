"""Tiny models for tests of mechanics, and the real SmolLM2 for tests of the result."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from interpreters import Interpreters


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    from tiny import tiny_llama, tiny_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def interpreters(tmp_path_factory) -> Interpreters:
    """Python in other processes, forked from one that has imported everything."""
    with Interpreters(tmp_path_factory.mktemp("interpreters")) as interpreters:
        yield interpreters


@pytest.fixture(scope="session")
def evaluate_caches(tmp_path_factory) -> Path:
    """Where `evaluate` keeps what it loads: one place for all tests, as Python imports the modules in it once."""
    evaluate = pytest.importorskip("evaluate")
    caches = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, caches / name.lower())
        yield caches


def pytest_collection_finish() -> None:
    """Every training ends with a garbage collection, which need not look through all that has been imported."""
    gc.collect()
    gc.freeze()
