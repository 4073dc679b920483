"""The oracle itself, against independent computations: hand-worked numbers, PyTorch in float64, published Philox vectors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adaselect_kernels import AdaSelectionOptions, AdaSelectionState, reference
from adaselect_kernels.options import METHODS, STATS
from tests.oracle import naive_stats


def philox4x32(counter, key):
    """Philox 4x32-10 with Python integers (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_independent_philox_has_the_published_answers(counter, key, words):
    assert tuple(philox4x32(counter, key)) == words


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (-1, 2**33 + 5), (2**40 + 7, 2**32), (-(2**63), 3)])
def test_noise_is_philox_of_row_step_and_seed(seed, step):
    u = reference.philox_uniform(70, torch.tensor(float(step), dtype=torch.float64), seed)
    bits = seed % 2**64
    for row in range(70):
        word = philox4x32((row, step % 2**32, step >> 32, 0), (bits % 2**32, bits >> 32))[0]
        assert u[row].item() == (word // 512 + 0.5) / 2**23
    assert torch.equal(u.float().double(), u)  # exact in float32
    assert ((u > 0) & (u < 1)).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_statistics_equal_pytorch_in_float64(generator, smoothing):
    logits = torch.randn(50, 7, generator=generator, dtype=torch.float64) * 4
    targets = torch.randint(7, (50,), generator=generator)
    targets[::9] = -100
    codes = list(range(len(STATS)))
    got = reference.per_sample_stats(logits, targets, codes, "sample", -100, smoothing)
    for name, row in zip(STATS, got, strict=True):
        expected = naive_stats(logits, targets, -100, smoothing)[name]
        torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_grad_norm_is_the_norm_of_the_logit_gradient_of_the_mean_loss(generator):
    logits = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (6, 4), generator=generator)
    targets[0, 1:3] = -100
    targets[1] = -100
    got = reference.per_sample_stats(logits.detach(), targets, [0, 2], "sample", -100, 0.0)
    for i in range(6):
        if i == 1:
            assert got[:, 1].tolist() == [0.0, 0.0]
            continue
        loss = F.cross_entropy(logits[i], targets[i])
        (gradient,) = torch.autograd.grad(loss, logits)
        assert got[0, i].item() == pytest.approx(loss.item(), rel=1e-12)
        assert got[1, i].item() == pytest.approx(gradient.norm().item(), rel=1e-12)


def test_margins_of_one_class_are_infinite():
    got = reference.per_sample_stats(
        torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), [3, 4, 0], "sample", -100, 0.0
    )
    assert got.tolist() == [[math.inf] * 2, [math.inf] * 2, [0.0] * 2]


def run(losses, names, grad_norms=None, state=None, k=1, seed=0, **options):
    losses = torch.as_tensor(losses, dtype=torch.float64)
    grad_norms = None if grad_norms is None else torch.as_tensor(grad_norms, dtype=torch.float64)
    codes = [METHODS.index(name) for name in names]
    packed = AdaSelectionOptions(**options).packed
    buffer = None if state is None else state.buffer
    scores, _ = reference.batch_scores(losses, grad_norms, None, buffer, codes, k, seed, packed)
    return scores.double().numpy()


LOSSES = np.array([0.3, 2.0, 1.1, 0.3, 4.2])


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_importances_against_numpy():
    u = (LOSSES - LOSSES.mean()) / (LOSSES.std() + 1e-6)
    t = LOSSES / ((1 + 1e-6) * LOSSES.max())
    a = 0.5 * np.log((1 + t) / (1 - t))
    g = LOSSES[::-1].copy()
    tau = 0.7
    for name, expected in {
        "big_loss": softmax(LOSSES / tau),
        "small_loss": softmax(-LOSSES / tau),
        "grad_norm": softmax(g / tau),
        "adaboost": a / a.sum(),
        "coreset1": 0.5 * softmax(LOSSES / tau) + 0.5 * softmax(-LOSSES / tau),
        "coreset2": softmax(-np.abs(LOSSES - LOSSES.mean()) / tau),
    }.items():
        np.testing.assert_allclose(run(LOSSES, [name], g, temperature=tau), expected, rtol=2e-7, err_msg=name)
    v = (g - g.mean()) / (g.std() + 1e-6)
    for name, expected in {
        "big_loss": softmax(u),
        "small_loss": softmax(-u),
        "grad_norm": softmax(v),
        "coreset1": 0.5 * softmax(u) + 0.5 * softmax(-u),
        "coreset2": softmax(-np.abs(u - u.mean())),
    }.items():
        np.testing.assert_allclose(run(LOSSES, [name], g, standardize=True), expected, rtol=2e-7, err_msg=name)


def test_adaboost_of_losses_that_are_not_positive_is_uniform_over_valid_rows():
    np.testing.assert_allclose(run([-1.0, -2.0, math.nan], ["adaboost"]), [0.5, 0.5, -math.inf])


@pytest.mark.parametrize(("power", "scale"), [(-0.5, "sum_squares"), (1.0, "sum_squares"), (0.5, "rms")])
def test_curriculum_reward(power, scale):
    state = AdaSelectionState.create(("big_loss",))
    divisor = (LOSSES**2).sum() if scale == "sum_squares" else np.sqrt((LOSSES**2).mean())
    for t in (1, 2, 3):
        got = run(LOSSES, ["big_loss"], state=state, curriculum_power=power, curriculum_scale=scale)
        np.testing.assert_allclose(got, softmax(LOSSES) * np.exp(-(t**power) * LOSSES / divisor), rtol=2e-7)


def test_losses_of_zero_have_reward_one():
    np.testing.assert_allclose(run([0.0, 0.0], ["big_loss"], curriculum_power=1.0), [0.5, 0.5])


@pytest.mark.parametrize("update", ["relative", "log_ratio"])
@pytest.mark.parametrize("method_loss", ["weighted", "selected"])
def test_weights_follow_equation_3_and_are_updated_before_scoring(update, method_loss):
    rng = np.random.default_rng()
    state = AdaSelectionState.create(("big_loss", "small_loss"))
    w, previous, beta, k = np.array([0.5, 0.5]), None, -0.6, 2
    for _ in range(5):
        losses = rng.exponential(size=6)
        alphas = np.array([softmax(losses), softmax(-losses)])
        ordered = np.sort(losses)
        method_losses = (
            alphas @ losses if method_loss == "weighted" else np.array([ordered[-k:].mean(), ordered[:k].mean()])
        )
        if previous is not None:
            change = (previous - method_losses) / previous if update == "relative" else np.log(previous / method_losses)
            w = w * np.exp(beta * change)
            w /= w.sum()
        previous = method_losses
        scores = run(
            losses, ["big_loss", "small_loss"], state=state, k=k, beta=beta, update=update, method_loss=method_loss
        )
        np.testing.assert_allclose(state.weights.numpy(), w, rtol=1e-10)
        np.testing.assert_allclose(scores, w @ alphas, rtol=1e-6)


def test_weights_do_not_move_where_the_increment_is_not_finite():
    state = AdaSelectionState.create(("big_loss", "small_loss"))
    run([1.0, 2.0], ["big_loss", "small_loss"], state=state)
    stored = state.previous_losses.clone()
    run([math.nan, math.inf], ["big_loss", "small_loss"], state=state)  # no valid row: t advances, nothing else
    assert state.weights.tolist() == [0.5, 0.5]
    assert torch.equal(state.previous_losses, stored)
    assert state.step.item() == 3
    run([0.0, 0.0], ["big_loss", "small_loss"], state=state)  # L_t = 0 moves the weight under "relative"
    assert state.weights.tolist() == pytest.approx([0.5, 0.5])
    assert state.previous_losses.tolist() == [0.0, 0.0]
    run([1.0, 2.0], ["big_loss", "small_loss"], state=state)  # L_{t-1} = 0: unchanged
    assert state.weights.tolist() == pytest.approx([0.5, 0.5])
    log_ratio = AdaSelectionState.create(("big_loss", "small_loss"))
    for losses in ([1.0, 2.0], [-1.0, -2.0], [-3.0, -4.0], [0.0, 0.0]):
        run(losses, ["big_loss", "small_loss"], state=log_ratio, update="log_ratio")
        assert log_ratio.weights.tolist() == [0.5, 0.5]


def test_weight_floor_holds_after_rescaling():
    state = AdaSelectionState.create(METHODS[:3])
    state.log_weights.copy_(torch.tensor([0.001, 0.2, 0.799], dtype=torch.float64).log())
    run([1.0, 2.0], METHODS[:3], [1.0, 2.0], state=state, weight_floor=0.3)
    floor = 0.1
    np.testing.assert_allclose(state.weights.numpy(), [floor, 0.2 * 0.9 / 0.999, 0.799 * 0.9 / 0.999], rtol=1e-9)
    state.log_weights.copy_(torch.tensor([0.01, 0.325, 0.665], dtype=torch.float64).log())
    run([1.0, 2.0], METHODS[:3], [1.0, 2.0], state=state, weight_floor=0.97)  # rescaling pushes the second one below
    weights = state.weights.numpy()
    assert weights.min() >= 0.97 / 3 * (1 - 1e-12)
    assert weights.sum() == pytest.approx(1.0)


def test_two_sided_choice_is_disjoint_and_ties_go_to_the_lower_row():
    ok = torch.tensor([True] * 5 + [False])
    for losses, k, expected in [
        ([5.0, 5.0, 5.0, 1.0, 5.0, 0.0], 2, {0, 3}),
        ([1.0, 1.0, 1.0, 5.0, 1.0, 0.0], 3, {3, 0, 1}),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 0.0], 4, {0, 1, 2, 3}),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 0.0], 6, {0, 1, 2, 3, 4, 5}),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 0.0], 1, {4}),
    ]:
        chosen = reference.baseline_topk("coreset1", torch.tensor(losses), None, ok, None, k)
        assert len(chosen) == k
        assert set(chosen.tolist()) == expected
