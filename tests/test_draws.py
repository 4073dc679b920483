"""Draws: their distribution by counting, their exact rule in big integers, and that the host never waits for the device."""

import bisect
import collections
import itertools
import math

import numpy as np
import pytest
import torch

from adaselect_kernels.draws import (
    draw_keys,
    draw_with_replacement,
    draw_without_replacement,
    empirical_cdf,
    push_losses,
    uniform_noise,
)
from tests import noise

pytestmark = pytest.mark.usefixtures("one_thread")


def fresh_seed(generator):
    return int(torch.randint(2**62, (), generator=generator))


def chi_square_holds(counts, probabilities):
    """The statistic is below its mean by seven standard deviations at most: false once in about 1e8 runs."""
    total = sum(counts)
    expected = [total * p for p in probabilities]
    assert min(expected) > 20
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    freedom = len(counts) - 1
    return statistic < freedom + 7 * math.sqrt(2 * freedom) + 20


@pytest.mark.parametrize(("step", "seed"), [(1, 0), (7, 2**63 + 5), (2**33 + 1, -3), (3, 2**64 - 1)])
def test_the_noise_is_philox(step, seed):
    got = uniform_noise(50, step, seed, torch.device("cpu"))
    assert np.array_equal(got.numpy(), noise.uniform(50, step, seed % 2**64))


class TestWithoutReplacement:
    def test_the_order_of_drawing_has_its_distribution(self, generator):
        """P(i, then j) = w_i / W * w_j / (W - w_i)."""
        weights = torch.rand(4, generator=generator) / 2 + 0.5
        seed, drawn = fresh_seed(generator), collections.Counter()
        for step in range(1200):
            drawn[tuple(draw_without_replacement(weights, 2, step, seed, order="score").tolist())] += 1
        w, total = weights.tolist(), weights.sum().item()
        pairs = list(itertools.permutations(range(4), 2))
        assert chi_square_holds(
            [drawn[pair] for pair in pairs], [w[i] / total * w[j] / (total - w[i]) for i, j in pairs]
        )

    @pytest.mark.parametrize("power", [0, 0.5, 1.0, 3.0])
    def test_keys_are_those_of_efraimidis_and_spirakis(self, power, generator):
        weights, seed = torch.rand(200, generator=generator, dtype=torch.float64), fresh_seed(generator)
        e = -np.log(noise.uniform(200, 5, seed))
        expected = np.argsort(e / weights.numpy() ** power, kind="stable")[:40]
        got = draw_without_replacement(weights, 40, 5, seed, power=power, order="score")
        keys = np.log(weights.numpy() ** power / e)
        np.testing.assert_allclose(draw_keys(weights, 5, seed, power=power), keys, rtol=1e-6, atol=1e-6)
        assert sum(a != b for a, b in zip(got.tolist(), expected.tolist(), strict=True)) <= 2  # one tie of float32 keys
        assert torch.equal(draw_without_replacement(weights, 40, 5, seed, power=power), got.sort().values)

    def test_a_high_power_does_not_underflow(self):
        """0.9^5000 is below the smallest float64: as numbers all these weights would be 0."""
        weights = torch.tensor([0.5, 0.6, 0.4, 0.3])
        assert draw_without_replacement(weights, 3, 1, 0, power=5000.0, order="score").tolist() == [1, 0, 2]

    def test_rows_of_weight_zero_come_after_all_others_and_invalid_ones_last(self, generator):
        weights = torch.tensor([0.0, math.nan, 1e-300, 0.0, math.inf, 1e300, -1.0, 0.0], dtype=torch.float64)
        seed, first_zeros = fresh_seed(generator), collections.Counter()
        for step in range(200):
            drawn = draw_without_replacement(weights, 8, step, seed, order="score").tolist()
            assert set(drawn[:2]) == {2, 5}
            assert set(drawn[2:5]) == {0, 3, 7}
            assert drawn[5:] == [1, 4, 6]
            first_zeros[drawn[2]] += 1
        assert chi_square_holds([first_zeros[row] for row in (0, 3, 7)], [1 / 3] * 3)

    def test_zero_to_the_zeroth_is_one(self):
        firsts = {
            draw_without_replacement(torch.tensor([0.0, 1.0]), 1, step, 0, power=0.0).item() for step in range(20)
        }
        assert firsts == {0, 1}

    def test_no_usable_weight_at_all(self):
        assert draw_without_replacement(torch.full((4,), math.nan), 2, 1, 0).tolist() == [0, 1]
        assert draw_keys(torch.zeros(4), 1, 0).isfinite().all()


def by_inverse_cdf(weights, k, step, seed):
    """The rule in Python's integers: q = ceil(2^B w / max w), t = floor(r sum q / 2^46), the row in whose share t falls."""
    usable = [w if math.isfinite(w) and w >= 0 else None for w in weights]
    top = max((w for w in usable if w is not None), default=0.0)
    scale = 2 ** (39 - (len(weights) - 1).bit_length())
    if top > 0:
        shares = [max(1, math.ceil(w / top * scale)) if w else 0 for w in usable]
    else:
        shares = [int(w is not None or all(u is None for u in usable)) for w in usable]
    ends = list(itertools.accumulate(shares))
    bits = [int(word) // 512 for word in noise.words(2 * k, step, seed)]
    draws = [bisect.bisect_right(ends, ((bits[j] * 2**23 + bits[k + j]) * ends[-1]) // 2**46) for j in range(k)]
    rows = sorted(draws)
    return rows, [shares[row] / ends[-1] for row in rows]


WEIGHTS = {
    "one row": lambda g: torch.rand(1, generator=g),
    "a few": lambda g: torch.rand(7, generator=g),
    "a power of two": lambda g: torch.rand(64, generator=g),
    "many": lambda g: torch.rand(5000, generator=g, dtype=torch.float64),
    "bfloat16": lambda g: torch.rand(50, generator=g).bfloat16(),
    "over 300 decades": lambda g: 10 ** (600 * torch.rand(300, generator=g, dtype=torch.float64) - 300),
    "zeros and invalid ones": lambda g: torch.tensor([0.0, 1.0, math.nan, 2.0, math.inf, -1.0, 0.0, 3.0]),
    "all zero": lambda g: torch.tensor([0.0, math.nan, 0.0]),
    "none usable": lambda g: torch.full((3,), math.nan),
}


class TestWithReplacement:
    @pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS.keys())
    def test_it_is_the_inverse_cdf_over_integers(self, make, generator):
        weights, seed = make(generator), fresh_seed(generator)
        for step in (1, 2, 3):
            rows, probabilities = draw_with_replacement(weights, 40, step, seed)
            expected = by_inverse_cdf(weights.tolist(), 40, step, seed)
            assert (rows.tolist(), probabilities.tolist()) == expected

    def test_so_many_rows_that_the_last_bits_of_the_noise_count(self, generator):
        """23 bits alone would put a few dozen of these draws into another row."""
        weights, seed = torch.rand(100_000, generator=generator), fresh_seed(generator)
        rows, probabilities = draw_with_replacement(weights, 4000, 1, seed)
        assert (rows.tolist(), probabilities.tolist()) == by_inverse_cdf(weights.tolist(), 4000, 1, seed)

    def test_its_distribution_by_counting(self, generator):
        weights = torch.rand(6, generator=generator, dtype=torch.float64) + 0.05
        rows, probabilities = draw_with_replacement(weights, 200_000, 1, fresh_seed(generator))
        exact = weights / weights.sum()
        assert chi_square_holds(rows.bincount(minlength=6).tolist(), exact.tolist())
        torch.testing.assert_close(probabilities, exact[rows], rtol=1e-8, atol=0)  # integers: 2^-36 of the largest


@pytest.mark.parametrize("draw", [draw_without_replacement, draw_with_replacement])
class TestBoth:
    def test_a_draw_is_a_function_of_its_arguments(self, draw, generator):
        weights, seed = torch.rand(100, generator=generator), fresh_seed(generator)
        before = weights.clone()

        def drawn(step, seed=seed):
            rows = draw(weights, 10, step, seed)
            return tuple((rows if isinstance(rows, torch.Tensor) else rows[0]).tolist())

        steps = (3, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64))
        assert len({drawn(step) for step in steps}) == 1
        assert len({drawn(step) for step in range(10)} | {drawn(3, seed + 1)}) == 11
        assert torch.equal(weights, before)

    def test_it_traces_as_one_graph(self, draw, generator):
        def function(weights, step):
            return draw(weights, 8, step, 5)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for step in (1, 2):
            weights = torch.rand(32, generator=generator)
            pairs = zip(
                _tensors(compiled(weights, torch.tensor(step))), _tensors(draw(weights, 8, step, 5)), strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs)

    def test_the_host_reads_nothing(self, draw):
        """A meta tensor has no values: reading one raises."""
        results = _tensors(draw(torch.empty(50, device="meta"), 8, torch.empty((), device="meta"), 5))
        assert all(result.shape == (8,) for result in results)

    @pytest.mark.parametrize(
        ("weights", "k", "step", "seed", "error", "match"),
        [
            (torch.ones(4), 0, 1, 0, ValueError, "k must be"),
            (torch.ones(4), 1.0, 1, 0, TypeError, "k must be an int"),
            (torch.ones(4, dtype=torch.int64), 1, 1, 0, TypeError, "weights must be float16"),
            (torch.ones(0), 1, 1, 0, ValueError, r"weights must be \[N\] with N >= 1"),
            (torch.ones(2, 2), 1, 1, 0, ValueError, r"weights must be \[N\]"),
            (torch.ones(4), 1, torch.ones(2), 0, ValueError, "step must be a scalar"),
            (torch.ones(4), 1, torch.ones((), device="meta"), 0, ValueError, "step must be a scalar on cpu"),
            (torch.ones(4), 1, 1, 2**64, ValueError, "64 bits"),
            (torch.ones(4), 1, 1, 0.5, TypeError, "seed must be an int"),
        ],
    )
    def test_bad_input_is_named(self, draw, weights, k, step, seed, error, match):
        with pytest.raises(error, match=match):
            draw(weights, k, step, seed)


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_more_rows_than_there_are_without_replacement():
    with pytest.raises(ValueError, match=r"k must be in \[1, N\] = \[1, 3\], got 4"):
        draw_without_replacement(torch.ones(3), 4, 1, 0)


@pytest.mark.parametrize(("power", "error"), [(-1.0, ValueError), (math.inf, ValueError), ("1", TypeError)])
def test_the_power_is_checked(power, error):
    with pytest.raises(error, match="power must be"):
        draw_keys(torch.ones(3), 1, 0, power=power)


class TestHistory:
    def test_the_share_at_or_below(self, generator):
        history = torch.randint(6, (40,), generator=generator).float()  # ties
        history[torch.randperm(40, generator=generator)[:9]] = math.nan
        losses = torch.cat(
            [torch.randint(-1, 8, (20,), generator=generator).float(), torch.tensor([math.inf, -math.inf])]
        )
        filled = [x for x in history.tolist() if not math.isnan(x)]
        expected = [sum(x <= loss for x in filled) / len(filled) for loss in losses.tolist()]
        assert empirical_cdf(history, losses).tolist() == expected

    def test_without_any_and_of_no_number(self):
        history = torch.full((3,), math.nan)
        assert empirical_cdf(history, torch.tensor([1.0, -5.0])).tolist() == [1, 1]
        assert empirical_cdf(torch.ones(3), torch.tensor([math.nan])).isnan().all()

    @pytest.mark.parametrize("size", [1, 5, 16])
    def test_the_ring_keeps_the_last(self, size, generator):
        history, count = torch.full((size,), math.nan), torch.tensor(0)
        kept, pushed = collections.deque(maxlen=size), 0
        for rows in (3, 1, 7, 20, 2, 5, 4):
            losses, valid = torch.rand(rows, generator=generator), torch.rand(rows, generator=generator) < 0.7
            push_losses(history, count, losses, valid)
            kept.extend(losses[valid].tolist())
            pushed += int(valid.sum())
            assert count == pushed
            oldest = pushed % size if pushed > size else 0
            ring = history.tolist()
            assert (ring[oldest:] + ring[:oldest])[: len(kept)] == list(kept)
            assert all(map(math.isnan, ring[len(kept) :]))

    def test_the_host_reads_nothing(self):
        history, count = torch.empty(8, device="meta"), torch.empty((), device="meta", dtype=torch.int64)
        push_losses(history, count, torch.empty(5, device="meta"), torch.empty(5, device="meta", dtype=torch.bool))
        assert empirical_cdf(history, torch.empty(5, device="meta")).shape == (5,)
