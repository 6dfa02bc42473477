"""What the tests of this folder share; the models are built in `extrapolation_models.py`."""

from __future__ import annotations

import pytest
import torch
from extrapolation_models import build_llama, save_pair


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory):
    base, adapter, _ = save_pair(build_llama(), tmp_path_factory.mktemp("llama"))
    return base, adapter


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(2, 26).reshape(2, 12)
