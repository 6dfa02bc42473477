"""The losses against numbers worked out by hand, and those over the vocabulary against dense autograd in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from hf_unlearn import lm_head
from hf_unlearn.lm_head import LMHead
from hf_unlearn.losses import (
    ceu,
    cross_entropy,
    dpo,
    gradient_ascent,
    margin_flattening,
    npo,
    npo_memorization,
    satimp,
    simnpo,
    squared_distance,
    targeted_memorization,
    undial,
    weighted_ascent,
)


LN2 = math.log(2)
# Two rows: p = 1/2, 1/4 and p = 1/8; under the reference 1/2, 1/2 and 1/4. Each row is half as likely: r = −ln 2.
ROWS = torch.tensor([0, 0, 1])
REFERENCE = torch.tensor([0.5, 0.5, 0.25]).log()


@pytest.fixture
def log_probs() -> torch.Tensor:
    return torch.tensor([0.5, 0.25, 0.125]).log().requires_grad_()


def assert_loss(loss: torch.Tensor, values: list[float], of: torch.Tensor, slopes: list[float]) -> None:
    torch.testing.assert_close(loss.detach(), torch.tensor(values), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), of)[0], torch.tensor(slopes), rtol=1e-5, atol=1e-7)


class TestTokens:
    def test_cross_entropy_and_ascent(self, log_probs):
        values = [0.6931472, 1.3862944, 2.0794415]
        assert_loss(cross_entropy(log_probs), values, log_probs, [-1.0, -1.0, -1.0])
        assert_loss(gradient_ascent(log_probs), [-value for value in values], log_probs, [1.0, 1.0, 1.0])

    def test_weighted_ascent(self, log_probs):
        # p·ln p; the weight p has no gradient, so the slope is p
        assert_loss(
            weighted_ascent(log_probs, 1.0), [-0.3465736, -0.3465736, -0.2599302], log_probs, [0.5, 0.25, 0.125]
        )

    def test_weighted_ascent_of_exponent_zero_is_ascent(self, log_probs):
        torch.testing.assert_close(weighted_ascent(log_probs, 0.0), gradient_ascent(log_probs))

    def test_satimp(self, log_probs):
        # p²·(1 − p): 1/4·1/2, 1/16·3/4, 1/64·7/8, each times ln p
        slopes = [0.125, 0.046875, 0.013671875]
        assert_loss(satimp(log_probs, 2.0, 1.0), [-0.0866434, -0.0649826, -0.0284299], log_probs, slopes)


class TestRows:
    def test_npo(self, log_probs):
        # β = 1: σ(−r) = σ(ln 2) = 2/3, −2·ln(2/3) = 0.8109302 a row; slope of a row 2·σ(r) = 2/3. Row 0 has two tokens,
        # which share its loss and each get the slope of the row.
        loss = npo(log_probs, REFERENCE, ROWS, 1.0)
        assert_loss(loss, [0.4054651, 0.4054651, 0.8109302], log_probs, [2 / 3, 2 / 3, 2 / 3])
        memorization = npo_memorization(log_probs, REFERENCE, ROWS, 1.0)
        torch.testing.assert_close(memorization, -npo(log_probs, REFERENCE, ROWS, 1.0))

    def test_npo_of_small_beta_is_ascent(self, log_probs):
        # slope 2·σ(β·r) → 1
        slopes = torch.autograd.grad(npo(log_probs, REFERENCE, ROWS, 1e-6).sum(), log_probs)[0]
        torch.testing.assert_close(slopes, torch.ones(3), rtol=1e-5, atol=0)

    def test_simnpo(self, log_probs):
        # β = 2: mean ln p is −1.5·ln 2 and −3·ln 2, so σ(3·ln 2) = 8/9 and σ(6·ln 2) = 64/65, −ln of which are 0.1177830
        # and 0.0155042. Slope of a token: 2·(1 − σ) / length.
        loss = simnpo(log_probs, ROWS, 2.0, 0.0)
        assert_loss(loss, [0.0588915, 0.0588915, 0.0155042], log_probs, [1 / 9, 1 / 9, 2 / 65])

    def test_simnpo_margin(self, log_probs):
        # γ = ln 2: σ(2·ln 2) = 4/5 and σ(5·ln 2) = 32/33
        loss = simnpo(log_probs, ROWS, 2.0, LN2)
        assert_loss(loss, [0.1115718, 0.1115718, 0.0307717], log_probs, [1 / 5, 1 / 5, 2 / 33])

    def test_dpo(self, log_probs):
        # Alternate r' = ln 2 + ln 2 and 0, in the order of rows 1, 0, 0. β = 1: σ(ln 8) = 8/9 and σ(ln 2) = 2/3.
        alternate = torch.tensor([0.0, LN2, LN2], requires_grad=True)
        rows = torch.tensor([1, 0, 0])
        values = [0.1177830, 0.1177830, 0.8109302]
        assert_loss(dpo(log_probs - REFERENCE, ROWS, alternate, rows, 1.0), values, log_probs, [2 / 9, 2 / 9, 2 / 3])
        assert_loss(
            dpo(log_probs - REFERENCE, ROWS, alternate, rows, 1.0), values, alternate, [-2 / 3, -2 / 9, -2 / 9]
        )

    def test_targeted_memorization(self, log_probs):
        # Mean −ln p is 1.5·ln 2 and 3·ln 2, of the alternates 3·ln 2 and ln 2; w = 1/4: 0.75·ln 2 and 2.75·ln 2.
        alternate = torch.tensor([-LN2, -2 * LN2, -4 * LN2], requires_grad=True)
        rows = torch.tensor([1, 0, 0])
        values = [0.2599302, 0.2599302, 1.9061547]
        assert_loss(
            targeted_memorization(log_probs, ROWS, alternate, rows, 0.25), values, log_probs, [-1 / 2, -1 / 2, -1]
        )
        assert_loss(
            targeted_memorization(log_probs, ROWS, alternate, rows, 0.25), values, alternate, [1 / 4, 1 / 8, 1 / 8]
        )

    def test_no_rows(self):
        nothing, rows = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        for loss in (
            npo(nothing, nothing, rows, 1.0),
            simnpo(nothing, rows, 1.0, 0.0),
            dpo(nothing, rows, nothing, rows, 1.0),
            targeted_memorization(nothing, rows, nothing, rows, 1.0),
        ):
            assert loss.shape == (0,)


def test_squared_distance():
    # (1² + 3²) / 2 = 5; slope 2·difference / 2
    activations = torch.tensor([[2.0, 3.0]], requires_grad=True)
    assert_loss(squared_distance(activations, torch.tensor([1.0, 0.0])), [5.0], activations, [[1.0, 3.0]])


class TestVocabularyByHand:
    """With the identity as head, logits are hidden states."""

    def test_undial(self):
        # p = (3/4, 1/4). The teacher takes ln 9 off the target's logit ln 9: (1/2, 1/2).
        hidden = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
        reference = torch.tensor([[9.0, 1.0]]).log()
        loss, is_top1 = LMHead(torch.eye(2)).score_tiles(hidden, undial(reference, torch.tensor([0]), math.log(9)))
        assert_loss(loss, [0.8369882], hidden, [[0.25, -0.25]])  # −(ln 3/4 + ln 1/4) / 2
        assert is_top1.tolist() == [True]

    def test_ceu(self):
        # p = (1/2, 1/4, 1/4), without the target (0, 1/2, 1/2): cross-entropy ln 4, slope p − q
        hidden = torch.tensor([[4.0, 2.0, 2.0]]).log().requires_grad_()
        loss, is_top1 = LMHead(torch.eye(3)).score_tiles(hidden, ceu(torch.tensor([0])))
        assert_loss(loss, [1.3862944], hidden, [[0.5, -0.25, -0.25]])
        assert is_top1.tolist() == [True]

    def test_margin_flattening(self):
        # (3 − 1)² = 4, slope 2·2·(onehot − 1/4)
        hidden = torch.tensor([[3.0, 1.0, -1.0, 1.0]], requires_grad=True)
        loss, is_top1 = LMHead(torch.eye(4)).score_tiles(hidden, margin_flattening(torch.tensor([1])))
        assert_loss(loss, [4.0], hidden, [[3.0, -1.0, -1.0, -1.0]])
        assert is_top1.tolist() == [False]


# ---- Dense autograd in fp64 ----

N, H, V = 7, 5, 11


def dense_logits(head: LMHead, hidden: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def dense_cross_entropy(teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, teacher.detach(), reduction="none")


DENSE = {
    "undial": lambda logits, reference, targets: dense_cross_entropy(
        (reference - 3.0 * torch.nn.functional.one_hot(targets, V)).softmax(-1), logits
    ),
    "ceu": lambda logits, reference, targets: dense_cross_entropy(
        logits.masked_fill(torch.nn.functional.one_hot(targets, V).bool(), -torch.inf).softmax(-1), logits
    ),
    "margin": lambda logits, reference, targets: (logits.max(-1).values - logits.mean(-1)) ** 2,
    "score": lambda logits, reference, targets: -(logits / 2).log_softmax(-1)[range(N), targets],
    "kl": lambda logits, reference, targets: torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.softmax(-1), reduction="none"
    ).sum(-1),
}


def tiled(name: str, head: LMHead, hidden, reference_hidden, targets, reference_head: LMHead | None):
    if name == "score":
        return -head.score(hidden, targets, 2.0).log_probs
    if name == "kl":
        return head.kl_from_reference(hidden, reference_hidden, targets, reference_head)[0]
    tiles = {
        "undial": undial(reference_hidden, targets, 3.0, reference_head),
        "ceu": ceu(targets),
        "margin": margin_flattening(targets),
    }
    return head.score_tiles(hidden, tiles[name])[0]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("rows_a_tile", [1, 3, 100])
@pytest.mark.parametrize("name", DENSE)
def test_tiles_equal_dense_autograd(name, rows_a_tile, trained, monkeypatch):
    monkeypatch.setattr(lm_head, "TILE", rows_a_tile * V)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    options = {"logit_scale": 0.7, "softcap": 3.0}
    head = LMHead(random(V, H), random(V), **options)
    # Where the head is trained, the reference has one of its own.
    reference_head = LMHead(random(V, H), random(V), **options) if trained else None
    hidden, reference_hidden = random(N, H), random(N, H)
    targets, weights = torch.randint(V, (N,), generator=generator), random(N)

    inputs = [hidden, head.weight, head.bias] if trained else [hidden]
    for tensor in inputs:
        tensor.requires_grad_()
    values = tiled(name, head, hidden, reference_hidden, targets, reference_head)
    gradients = torch.autograd.grad((values * weights).sum(), inputs)

    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    dense_head = LMHead(doubles[1], doubles[2], **options)
    own = reference_head if trained else LMHead(head.weight.detach(), head.bias.detach(), **options)
    reference = dense_logits(LMHead(own.weight.double(), own.bias.double(), **options), reference_hidden.double())
    expected = DENSE[name](dense_logits(dense_head, doubles[0]), reference, targets)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), doubles[: len(inputs)])
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=2e-6)


def test_a_trained_head_takes_no_position_too():
    weight = torch.randn(V, H, requires_grad=True)
    scores = LMHead(weight).score(torch.zeros(0, H), torch.zeros(0, dtype=torch.long))
    scores.log_probs.sum().backward()
    assert scores.log_probs.shape == (0,)
    assert not weight.grad.any()
