"""Every operator against dense fp64 matrices that are computed from the tensors in the files, on small adapters."""

from __future__ import annotations

import math

import pytest
import torch
from extrapolation_models import GPT2_TARGETS, build_gpt2, build_llama, save_pair
from random_adapters import IDS, SHAPES, VARIANTS, check_saved, dense, save_random
from safetensors.torch import load_file, save_file

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import (
    LoraAdapter,
    LowRankUpdate,
    SignConsensus,
    average,
    extrapolate,
    fisher_factors,
    momentum,
    momentum_weights,
    project,
    run_checkpoints,
    save_forget_adapter,
    scale_layers,
    subtract,
    truncate,
)


@pytest.fixture(params=VARIANTS, ids=IDS)
def three(request, tmp_path):
    """Adapters of one kind with ranks 3, 2 and 4."""
    return [
        save_random(tmp_path / f"adapter-{seed}", seed, r=rank, **request.param) for seed, rank in enumerate((3, 2, 4))
    ]


def test_average(three, tmp_path):
    weights = [0.5, -1.25, 2]
    matrices = [dense(adapter) for adapter in three]
    wanted = {
        module: sum(weight * matrix[module] for weight, matrix in zip(weights, matrices, strict=True))
        for module in SHAPES
    }
    check_saved(average(three, weights), tmp_path / "out", wanted)
    wanted = {module: sum(matrix[module] for matrix in matrices) / 3 for module in SHAPES}
    check_saved(average([adapter.folder for adapter in three]), tmp_path / "mean", wanted)


def test_modules_that_one_adapter_leaves_alone_count_as_zero(tmp_path):
    first = save_random(tmp_path / "first", 0, shapes={"model.a": (6, 10), "model.b": (7, 5)})
    second = save_random(tmp_path / "second", 1, r=2, shapes={"model.b": (7, 5), "model.c": (4, 4)})
    one, two = dense(first), dense(second)
    wanted = {"model.a": one["model.a"] / 2, "model.b": (one["model.b"] + two["model.b"]) / 2}
    saved = check_saved(average([first, second]), tmp_path / "out", wanted | {"model.c": two["model.c"] / 2})
    assert [len(pair.A) for pair in saved.modules.values()] == [3, 5, 2]


def test_ranks_of_modules_whose_names_end_alike(tmp_path):
    shapes = {"layers.1.a": (6, 10), "vision.layers.1.a": (6, 10), "vision.layers.11.a": (6, 10)}
    first = save_random(tmp_path / "first", 0, shapes=shapes)
    second = save_random(tmp_path / "second", 1, r=2, shapes={"layers.1.a": (6, 10)})
    saved = average([first, second]).save(tmp_path / "out")
    assert [len(saved.modules[name].A) for name in shapes] == [5, 3, 3]
    assert all(pair.scaling == 1 for pair in saved.modules.values())


def test_momentum_weights():
    assert momentum_weights(1) == [1]
    torch.testing.assert_close(momentum_weights(3), [0.105625, 0.219375, 0.675])  # .325², .675·.325, .675
    torch.testing.assert_close(momentum_weights(2, 0.25), [0.75, 0.25])


def test_momentum_takes_the_checkpoints_by_step(tmp_path):
    adapters = {step: save_random(tmp_path / "run" / f"checkpoint-{step}", step) for step in (10, 2, 9)}
    (tmp_path / "run" / "checkpoint-best").mkdir()
    assert [path.name for path in run_checkpoints(tmp_path / "run")] == [
        "checkpoint-2",
        "checkpoint-9",
        "checkpoint-10",
    ]
    average = {module: dense(adapters[2])[module] for module in SHAPES}
    for step in (9, 10):
        average = {module: 0.6 * dense(adapters[step])[module] + 0.4 * average[module] for module in SHAPES}
    check_saved(momentum(tmp_path / "run", eta=0.6), tmp_path / "out", average)


def test_project(three, tmp_path):
    memory, retain, _ = three
    name = "base_model.model.model.a.lora_B.weight"
    tensors = load_file(retain.folder / "adapter_model.safetensors")
    tensors[name][2] = 0
    save_file(tensors, retain.folder / "adapter_model.safetensors")
    wanted, others = dense(memory), dense(retain)
    for module, matrix in wanted.items():
        for row, other in zip(matrix, others[module], strict=True):  # rows are views
            if other.count_nonzero():
                row -= (row @ other) / (other @ other) * other
    torch.testing.assert_close(wanted["model.a"][2], dense(memory)["model.a"][2])
    check_saved(project(memory, retain.folder), tmp_path / "out", wanted)


def test_project_with_a_row_that_is_only_rounding(tmp_path):
    memory = save_random(tmp_path / "memory", 0, r=2, shapes={"model.a": (6, 10)})
    retain = save_random(tmp_path / "retain", 1, r=2, shapes={"model.a": (6, 10)})
    tensors = load_file(retain.folder / "adapter_model.safetensors")
    a, b = tensors.values()
    a[1] = a[0] * (1 / 3)
    b[4] = torch.tensor([1.0, -3.0])  # times A: not quite zero
    save_file(tensors, retain.folder / "adapter_model.safetensors")
    saved = project(memory, retain.folder).save(tmp_path / "out")
    other = dense(LoraAdapter.load(retain.folder))["model.a"][4]
    assert 0 < other.abs().max() < 1e-6
    torch.testing.assert_close(saved.delta("model.a")[4], memory.delta("model.a")[4], atol=1e-5, rtol=0)
    assert not torch.allclose(saved.delta("model.a")[3], memory.delta("model.a")[3], atol=1e-2)


def test_project_keeps_what_the_retain_adapter_does_not_adapt(tmp_path):
    memory = save_random(tmp_path / "memory", 0)
    retain = save_random(tmp_path / "retain", 1, shapes={"model.a": (6, 10), "model.c": (4, 4)})
    update = project(memory, retain)
    assert list(update.terms) == ["model.a", "model.b"]
    saved = update.save(tmp_path / "out")
    torch.testing.assert_close(saved.delta("model.b"), memory.delta("model.b"), atol=1e-5, rtol=0)
    product = (saved.delta("model.a").double() * dense(retain)["model.a"]).sum(1)
    torch.testing.assert_close(product, torch.zeros(6, dtype=torch.float64), atol=1e-3, rtol=0)


def test_subtract(three, tmp_path):
    first, second, _ = three
    wanted = {module: dense(first)[module] - 0.75 * dense(second)[module] for module in SHAPES}
    check_saved(subtract(first, second, 0.75), tmp_path / "out", wanted)


def test_scale_layers(three, tmp_path):
    factors = {"model.a": 0.25, "model.b": 3}
    wanted = {module: factors[module] * dense(three[0])[module] for module in SHAPES}
    check_saved(scale_layers(three[0], factors), tmp_path / "out", wanted)
    assert list(scale_layers(three[0], {"model.a": 0, "model.b": 1}).terms) == ["model.b"]


def test_fisher_factors(three):
    factors = fisher_factors(three[0], {"model.a": 3.0, "model.b": 0.5}, {"model.a": 1.0, "model.b": 2.0})
    norms = {module: matrix.norm().item() for module, matrix in dense(three[0]).items()}
    mean = (0.75 * norms["model.a"] + 0.2 * norms["model.b"]) / sum(norms.values())
    assert factors == pytest.approx({"model.a": 0.75 / mean, "model.b": 0.2 / mean}, rel=1e-9)


def test_norms_and_inner_products(three):
    first, second = (LowRankUpdate.of(adapter) for adapter in three[:2])
    flat = [torch.cat([matrix.flatten() for matrix in dense(adapter).values()]) for adapter in three[:2]]
    assert first.norm == pytest.approx(flat[0].norm().item(), rel=1e-12)
    assert first.inner(second) == pytest.approx((flat[0] @ flat[1]).item(), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_truncate(three, tmp_path, rank):
    exact = {module: sum(dense(adapter)[module] for adapter in three) / 3 for module in SHAPES}
    wanted, tails, squares = {}, {}, {}
    for module, matrix in exact.items():
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        wanted[module] = u[:, :rank] * values[:rank] @ vt[:rank]
        tails[module], squares[module] = (part.square().sum().item() for part in (values[rank:], values))
    update, errors = truncate(average(three), rank)
    saved = check_saved(update, tmp_path / "out", wanted)
    for module in SHAPES:
        assert errors.tensors[module].relative == pytest.approx(math.sqrt(tails[module] / squares[module]), abs=1e-12)
        assert len(saved.modules[module].A) == min(rank, *SHAPES[module])
    overall = math.sqrt(sum(tails.values()) / sum(squares.values()))
    assert errors.relative == pytest.approx(overall, abs=1e-12)
    recorded = saved.provenance["operator"]
    assert recorded["name"] == "average" and recorded["truncated_to_rank"] == rank
    assert recorded["truncation_error"]["relative"] == errors.relative


def test_truncate_one_adapter_to_its_own_rank_is_exact(three, tmp_path):
    update, errors = truncate(three[0], 4)
    assert errors.relative < 1e-12
    check_saved(update, tmp_path / "out", dense(three[0]))


def consensus_of(adapters) -> dict[str, torch.Tensor]:
    wanted = {}
    for module in SHAPES:
        stack = torch.stack([dense(adapter)[module] for adapter in adapters])
        agreed = (stack > 0).all(0) | (stack < 0).all(0)
        wanted[module] = torch.where(agreed, stack.mean(0), 0)
    return wanted


class TestSignConsensus:
    def test_against_brute_force(self, three):
        wanted = consensus_of(three)
        consensus = SignConsensus([three[0], three[1].folder, three[2]])
        transposed = consensus.config.fan_in_fan_out
        for module, matrix in wanted.items():
            delta = consensus.delta(module)
            torch.testing.assert_close(delta.double(), matrix.T if transposed else matrix, atol=1e-5, rtol=0)
            assert 0.05 < delta.count_nonzero() / delta.numel() < 0.6
            pieces = [consensus.delta_rows(module, first, first + 1) for first in range(len(delta))]
            torch.testing.assert_close(torch.cat(pieces), delta, atol=1e-5, rtol=0)
        norm, agreed = consensus.measure()
        flat = torch.cat([matrix.flatten() for matrix in wanted.values()])
        assert norm == pytest.approx(flat.norm().item(), rel=1e-6)
        assert agreed == flat.count_nonzero().item() / len(flat)

    @pytest.mark.parametrize("rank", [2, 6])
    def test_truncated(self, three, tmp_path, rank):
        wanted, tails, squares = {}, 0, 0
        for module, matrix in consensus_of(three).items():
            u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
            wanted[module] = u[:, :rank] * values[:rank] @ vt[:rank]
            tails, squares = tails + values[rank:].square().sum().item(), squares + values.square().sum().item()
        update, errors = truncate(SignConsensus(three), rank)
        saved = check_saved(update, tmp_path / "out", wanted)
        assert errors.relative == pytest.approx(math.sqrt(tails / squares), abs=1e-6)
        assert saved.provenance["operator"]["name"] == "consensus"

    def test_only_modules_of_all_adapters(self, tmp_path):
        first = save_random(tmp_path / "first", 0)
        second = save_random(tmp_path / "second", 1, shapes={"model.b": (7, 5), "model.c": (4, 4)})
        assert list(SignConsensus([first, second]).modules) == ["model.b"]
        third = save_random(tmp_path / "third", 2, shapes={"model.c": (4, 4)})
        with pytest.raises(UnlearningError, match="no module in common"):
            SignConsensus([first, third])

    @pytest.mark.parametrize("build", [build_llama, build_gpt2])
    def test_streamed_merge(self, tmp_path, build):
        options = {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True} if build is build_gpt2 else {}
        base, first, _ = save_pair(build(), tmp_path / "0", seed=1, **options)
        folders = [first, *(save_pair(build(), tmp_path / str(seed), seed=seed, **options)[1] for seed in (2, 3))]
        consensus = SignConsensus(folders)
        report = extrapolate(base, consensus, 1.5, tmp_path / "out", progress=False)
        before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
        matrices = [dense(LoraAdapter.load(folder)) for folder in folders]
        for name, tensor in before.items():
            module = name.removesuffix(".weight")
            if module not in matrices[0]:
                assert torch.equal(after[name], tensor)
                continue
            stack = torch.stack([matrix[module].T if options else matrix[module] for matrix in matrices])
            agreed = (stack > 0).all(0) | (stack < 0).all(0)
            wanted = tensor.double() - 1.5 * torch.where(agreed, stack.mean(0), 0)
            torch.testing.assert_close(after[name].double(), wanted, atol=1e-6, rtol=0)
        assert report.adapted_tensors == len(matrices[0])
        operator = report.provenance["operator"]
        assert operator["name"] == "consensus"
        assert [source["id"] for source in operator["sources"]] == [str(folder) for folder in folders]

    def test_it_is_no_adapter(self, three, tmp_path):
        with pytest.raises(UnlearningError, match="--rank"):
            save_forget_adapter(SignConsensus(three), 1.0, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_one_adapter_is_not_enough(self, three):
        with pytest.raises(UnlearningError, match="two adapters"):
            SignConsensus(three[:1])
