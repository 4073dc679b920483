"""Faults planted on purpose: each must be caught by the checks that the other tests rely on."""

import contextlib
import math
from unittest import mock

import pytest
import torch

from adaselect_kernels import AdaSelectionState, functional, fused_select, per_sample_stats, reference
from adaselect_kernels.options import STATS
from tests.oracle import check_fused_select


def faulty(*patches):
    """A fused_select that runs the reference with `patches` planted, and only it: the oracle stays right."""

    def select(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            for target, name, fault in patches:
                stack.enter_context(mock.patch.object(target, name, fault))
            return fused_select(*args, impl="reference", **kwargs)

    return select


def batch(n=40, c=6):
    logits = torch.randn(n, c) * 2
    return logits, torch.randint(c, (n,))


def last_row_first(scores, k, largest, order, right=reference.select_topk):
    chosen = len(scores) - 1 - right(scores.flip(0), k, largest, "score")
    return chosen.sort().values if order == "index" else chosen


def test_tie_order():
    logits, targets = torch.zeros(10, 3), torch.zeros(10, dtype=torch.long)
    check_fused_select(faulty(), logits, targets, 0.3, methods=("big_loss",))
    with pytest.raises(AssertionError, match="ties to the lower row"):
        check_fused_select(
            faulty((reference, "select_topk", last_row_first)), logits, targets, 0.3, methods=("big_loss",)
        )


@pytest.mark.parametrize(
    ("rounding", "gamma"),  # of 10 rows: 2.6, 2.4 and the tie 2.5
    [(math.floor, 0.26), (math.ceil, 0.24), (round, 0.25)],
    ids=["floor", "ceil", "half to even"],
)
def test_k_rounding(rounding, gamma):
    check_fused_select(faulty(), *batch(10), gamma)
    fault = (functional, "selected_count", lambda gamma, n: rounding(gamma * n))
    with pytest.raises(AssertionError, match="rows chosen, expected"):
        check_fused_select(faulty(fault), *batch(10), gamma)


def test_cancellation_of_a_confident_row():
    """grad_norm^2 = sum p^2 - 2 p_y + 1 is 0 in float32 once p_y rounds to 1."""

    def cancelling(logits, targets, stats, *rest, right=reference.per_sample_stats):
        table = right(logits, targets, stats, *rest)
        p = logits.softmax(1)
        p_y = p.gather(1, targets[:, None])[:, 0]
        table[list(stats).index(STATS.index("grad_norm"))] = (p.square().sum(1) - 2 * p_y + 1).clamp(min=0).sqrt()
        return table

    logits, targets = torch.zeros(1, 5), torch.tensor([2])
    logits[0, 2] = 20.0
    p = math.exp(-20.0) / (1 + 4 * math.exp(-20.0))
    right = pytest.approx(math.sqrt(20) * p, rel=1e-5)
    assert per_sample_stats(logits, targets, impl="reference").grad_norm.item() == right
    with mock.patch.object(reference, "per_sample_stats", cancelling):
        assert per_sample_stats(logits, targets, impl="reference").grad_norm.item() != right


def test_weights_updated_after_scoring():
    def late(state, m, method_losses, opts, right=reference.update_weights):
        before = state[:m].exp()
        right(state, m, method_losses, opts)
        return before

    fault = (reference, "update_weights", late)
    state = AdaSelectionState.create(("big_loss", "small_loss"))
    check_fused_select(faulty(fault), *batch(), 0.3, methods=state.methods, state=state)  # the first call has no L_0
    with pytest.raises(AssertionError, match="scores: error"):
        check_fused_select(faulty(fault), *batch(), 0.3, methods=state.methods, state=state)


def test_ignored_rows_in_the_batch_mean():
    def diluted(values, ok):
        mean = values.mean()
        return mean, (values - mean).square().mean().sqrt()

    logits, targets = batch()
    targets[::3] = -100
    with pytest.raises(AssertionError, match="scores: error"):
        check_fused_select(faulty((reference, "_mean_std", diluted)), logits, targets, 0.3, methods=("coreset2",))


def test_ignored_positions_in_the_mean_of_a_sample():
    def diluted(stat, values, kept, right=reference.mean_over_positions):
        return right(stat, values, torch.ones_like(kept))

    logits, targets = torch.randn(8, 5, 4), torch.randint(4, (8, 5))
    targets[:, ::2] = -100
    with pytest.raises(AssertionError, match="losses: element"):
        check_fused_select(faulty((reference, "mean_over_positions", diluted)), logits, targets, 0.5)


def test_ignored_rows_counted_as_valid():
    logits, targets = batch()
    targets[::3] = -100
    fault = (reference, "valid_samples", lambda targets, unit, ignore_index: torch.ones_like(targets, dtype=torch.bool))
    with pytest.raises(AssertionError):
        check_fused_select(faulty(fault), logits, targets, 0.3)


@pytest.mark.parametrize("lost", ["log_weights", "previous_losses", "step", "seed"])
def test_state_not_restored(lost):
    """A load that forgets one part does not continue as the original does."""
    methods = ("big_loss", "small_loss", "uniform")
    state = AdaSelectionState.create(methods, seed=3)
    for _ in range(4):
        fused_select(*batch(), 0.3, methods=methods, state=state, impl="reference")
    restored = AdaSelectionState.create(methods, seed=0)
    restored.load_state_dict(state.state_dict())
    if lost == "seed":
        restored.seed = 0
    else:
        getattr(restored, lost).copy_(getattr(AdaSelectionState.create(methods), lost))
    logits, targets = batch()
    one = fused_select(logits, targets, 0.3, methods=methods, state=state, impl="reference")
    two = fused_select(logits, targets, 0.3, methods=methods, state=restored, impl="reference")
    if lost == "previous_losses":
        assert not torch.equal(state.buffer, restored.buffer)
    assert not torch.equal(one.scores, two.scores)


def test_an_output_that_nobody_wrote():
    def forgetful(scores, k, largest, order):
        return torch.empty(k, dtype=torch.int64)  # poisoned by the fixture

    with pytest.raises(AssertionError, match=r"not the k best|repeated"):
        check_fused_select(faulty((reference, "select_topk", forgetful)), *batch(), 0.3)
