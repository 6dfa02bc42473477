"""The baselines in two real processes (gloo, CPU) against one."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from safetensors.torch import load_file


SCRIPT = Path(__file__).with_name("train_baselines.py")
RUNS = runpy.run_path(str(SCRIPT), run_name="imported")["RUNS"]


@pytest.fixture(scope="module")
def folders(interpreters, tmp_path_factory, tiny_model_dir) -> dict[int, Path]:
    """Processes -> what they wrote."""
    folders = {processes: tmp_path_factory.mktemp(f"baselines-{processes}") for processes in (1, 2)}
    code, said = interpreters.run(SCRIPT, folders[1], tiny_model_dir, 2)
    assert code == 0, said
    interpreters.launch(SCRIPT, folders[2], tiny_model_dir, 1)
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name, folders):
    file = "model.safetensors" if "all-weights" in name else "adapter_model.safetensors"
    one, two = (load_file(folder / name / file) for folder in folders.values())
    assert one.keys() == two.keys()
    assert max(value.abs().max().item() for value in one.values()) > 1e-3
    for key, value in one.items():
        assert (two[key] - value).abs().max() <= 1e-6, key
    facts = [json.loads((folder / f"{name}-0.json").read_text()) for folder in folders.values()]
    keys = [key for key in facts[0]["logs"][0] if key.startswith(("forget", "retain", "dual"))]
    assert len(facts[0]["logs"]) == len(facts[1]["logs"]) == 4
    for log, other in zip(facts[0]["logs"], facts[1]["logs"], strict=True):
        for key in keys:
            assert other[key] == pytest.approx(log[key], rel=1e-5, abs=1e-6), key


def test_all_processes_have_the_same_dual_variable(folders):
    one = json.loads((folders[1] / "pdu-0.json").read_text())["dual"]
    first, second = (json.loads((folders[2] / f"pdu-{rank}.json").read_text())["dual"] for rank in (0, 1))
    assert first == second
    assert first == pytest.approx(one, rel=1e-5)
    assert one[0] != 100.0
