"""A tiny model with its sets, and an adapter trained on them."""

from __future__ import annotations

import pytest
from command_lines import train_arguments, write_rows
from tiny import tiny_rows

from hf_unlearn.cli import main


@pytest.fixture(scope="session")
def files(tmp_path_factory, tiny_model_dir) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("faults")
    sets = {
        name: write_rows(folder / f"{name}.jsonl", tiny_rows(4, seed))
        for seed, name in enumerate(("forget", "retain"))
    }
    return {"model": str(tiny_model_dir), **sets}


@pytest.fixture(scope="session")
def adapter(files, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("faults-train") / "run"
    assert main(train_arguments(files, folder, "--max_steps", "3", "--use_cpu")) == 0
    return str(folder)
