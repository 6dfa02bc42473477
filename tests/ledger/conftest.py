"""The adapters of three requests, and a ledger that holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_adapters import OPTIONS, ROWS, filled, save_adapter

from hf_unlearn import Ledger


@pytest.fixture(scope="session")
def adapters(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("requests")
    return {
        id: save_adapter(tiny_model_dir, folder / id, seed, ROWS[id], **OPTIONS[id])
        for seed, id in enumerate(OPTIONS, start=1)
    }


@pytest.fixture
def ledger(adapters, tmp_path) -> Ledger:
    return filled(tmp_path / "ledger", adapters)
