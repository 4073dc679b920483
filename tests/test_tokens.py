"""TokenSelector: every rule against plain float64 loops, counts over ragged sequences, state, refusals, one traced graph."""

import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from adaselect_kernels import AdaSelectionOptions, TokenSelection, TokenSelector, selected_linear_cross_entropy
from adaselect_kernels.functional import select_from_losses
from adaselect_kernels.policies.tokens import RULES
from adaselect_kernels.state import AdaSelectionState
from tests import noise

IGNORE = -7
B, T, H, V = 3, 11, 5, 13  # nothing divides anything


def batch(generator, dtype=torch.float64):
    """Hidden states, classifier, bias, targets with padding at the end of a sequence and holes, and reference losses."""
    hidden = torch.randn(B, T, H, generator=generator, dtype=dtype)
    weight, bias = torch.randn(V, H, generator=generator, dtype=dtype), torch.randn(V, generator=generator, dtype=dtype)
    targets = torch.randint(V, (B, T), generator=generator)
    targets[1, 4:] = IGNORE
    targets[torch.rand(B, T, generator=generator) < 0.1] = IGNORE
    return hidden, weight, targets, bias, torch.rand(B, T, generator=generator, dtype=dtype) * 3


def expected_scores(rule, logits, targets, reference, label_smoothing, seed, step=1):
    """scores and losses [B][T] of one token at a time, in Python's floats; -inf where ignored."""
    e = -torch.tensor(noise.uniform(targets.numel(), step, seed)).log()
    scores, losses = torch.full(targets.shape, -math.inf, dtype=torch.float64), torch.zeros(targets.shape).double()
    for b, row in enumerate(targets.tolist()):
        for t, y in enumerate(row):
            if y == IGNORE:
                continue
            z = logits[b, t].tolist()
            lse = math.log(sum(math.exp(v) for v in z))
            p = [math.exp(v - lse) for v in z]
            loss = (1 - label_smoothing) * (lse - z[y]) + label_smoothing * (lse - sum(z) / len(z))
            losses[b, t] = loss
            scores[b, t] = {
                "loss": loss,
                "excess_loss": loss - float(reference[b, t]),
                "margin": max(v for j, v in enumerate(z) if j != y) - z[y],
                "entropy": -sum(q * math.log(q) for q in p),
                "grad_norm": math.sqrt(sum((q - (j == y)) ** 2 for j, q in enumerate(p))),
                "uniform": float(e[b * targets.shape[1] + t]),
            }[rule]
    return scores, losses


def expected_mask(scores, gamma, per_sequence):
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    places = list(itertools.product(*map(range, scores.shape)))
    for group in [[p for p in places if p[0] == b] for b in range(scores.shape[0])] if per_sequence else [places]:
        valid = [place for place in group if math.isfinite(scores[place])]
        if valid:
            k = min(max(math.floor(gamma * len(valid) + 0.5), 1), len(valid))
            for place in sorted(valid, key=lambda place: (-float(scores[place]), place))[:k]:
                mask[place] = True
    return mask


def assert_consistent(chosen: TokenSelection, gamma, per_sequence):
    """What every selection is, whatever its scores: the mask is the best of the scores, everything else counts it."""
    rows, columns = chosen.mask.shape
    assert torch.equal(chosen.mask, expected_mask(chosen.scores, gamma, per_sequence))
    places = chosen.mask.flatten().nonzero()[:, 0]
    static = [max(1, math.floor(gamma * n + 0.5)) for n in ([columns] * rows if per_sequence else [rows * columns])]
    assert torch.equal(chosen.indices, F.pad(places, (0, sum(static) - len(places)), value=-1))
    assert int(chosen.n_selected) == len(places)
    assert int(chosen.n_valid) == int(chosen.scores.isfinite().sum())
    assert chosen.indices.dtype == chosen.n_valid.dtype == chosen.n_selected.dtype == torch.int64
    assert not any(x is not None and x.requires_grad for x in chosen)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"adaselection"}))
def test_every_rule_is_its_loop(rule, per_sequence, generator):
    hidden, weight, targets, bias, reference = batch(generator)
    seed = int(torch.randint(2**40, (), generator=generator))
    settings = {"ignore_index": IGNORE, "label_smoothing": 0.2, "softcap": 3.0, "logit_scale": 0.5}
    given = {"reference": reference} if rule == "excess_loss" else {}
    logits = 3 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3)
    selector = TokenSelector(rule, 0.3, seed=seed, per_sequence=per_sequence, impl="reference", **settings)
    hidden.requires_grad_()
    for step in (1, 2):
        scores, losses = expected_scores(rule, logits, targets, reference, 0.2, seed, step)
        chosen = selector.select(hidden, weight, targets, bias, **given)
        assert_consistent(chosen, 0.3, per_sequence)
        assert chosen.scores.dtype == torch.float32
        torch.testing.assert_close(chosen.scores, scores.float(), rtol=3e-7, atol=1e-12)
        assert torch.equal(chosen.mask, expected_mask(scores, 0.3, per_sequence))
        if rule == "uniform":
            assert chosen.losses is None
        else:
            torch.testing.assert_close(chosen.losses, losses.float(), rtol=3e-7, atol=1e-12)
    assert selector.state.step == 3
    selector = TokenSelector(rule, 0.3, seed=seed, per_sequence=per_sequence, impl="reference", **settings)
    scores, _ = expected_scores(rule, logits, targets, reference, 0.2, seed)
    from_logits = selector.select_from_logits(logits, targets, **given)
    assert torch.equal(from_logits.mask, expected_mask(scores, 0.3, per_sequence))
    if rule in ("loss", "excess_loss", "uniform"):
        other = TokenSelector(rule, 0.3, seed=seed, per_sequence=per_sequence, ignore_index=IGNORE, impl="reference")
        from_losses = other.select_from_losses(losses, targets != IGNORE, **given)
        assert torch.equal(from_losses.mask, expected_mask(scores, 0.3, per_sequence))
        assert_consistent(from_losses, 0.3, per_sequence)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_adaselection_over_tokens_is_adaselection_over_their_losses(per_sequence, generator):
    """Its scores are checked in test_functional.py; here: over which tokens, with which state, how many are chosen."""
    methods, options = ("big_loss", "grad_norm", "uniform"), AdaSelectionOptions(update="log_ratio", beta=0.5)
    settings = {"methods": methods, "options": options, "seed": 5, "ignore_index": IGNORE, "impl": "reference"}
    by_hidden, by_logits = (TokenSelector("adaselection", 0.4, per_sequence=per_sequence, **settings) for _ in "ab")
    state = AdaSelectionState.create(methods, seed=5)
    for _ in range(3):
        hidden, weight, targets, bias, _ = batch(generator)
        logits = hidden @ weight.T + bias
        kept = targets != IGNORE
        y = torch.where(kept, targets, 0)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").masked_fill(
            ~kept.flatten(), math.nan
        )
        norms = (logits.softmax(-1) - F.one_hot(y, V)).norm(dim=-1).flatten()
        expected = select_from_losses(
            losses, 0.4, grad_norms=norms, methods=methods, options=options, state=state, impl="reference"
        )
        for chosen in (by_hidden.select(hidden, weight, targets, bias), by_logits.select_from_logits(logits, targets)):
            assert_consistent(chosen, 0.4, per_sequence)
            torch.testing.assert_close(chosen.scores.flatten(), expected.scores, rtol=1e-6, atol=0)
            torch.testing.assert_close(chosen.losses.flatten()[kept.flatten()], losses[kept.flatten()].float())
    torch.testing.assert_close(by_hidden.state.buffer, state.buffer, rtol=1e-9, atol=0)
    assert list(by_hidden.method_weights()) == list(methods)
    plain = TokenSelector(
        "adaselection", 0.4, methods=("big_loss", "uniform"), per_sequence=per_sequence, impl="reference"
    )
    kept = torch.rand(B, T, generator=generator) < 0.6
    assert_consistent(plain.select_from_losses(torch.rand(B, T, generator=generator), kept), 0.4, per_sequence)
    assert TokenSelector("loss", 0.4).method_weights() is None


def test_the_count_is_of_the_valid_tokens():
    losses = torch.arange(12.0).reshape(2, 6)
    for valid, gamma, count in ((6, 0.25, 2), (6, 0.24, 1), (1, 0.01, 1), (12, 1.0, 12), (5, 0.5, 3), (0, 0.5, 0)):
        kept = torch.arange(12).reshape(2, 6) < valid
        chosen = TokenSelector("loss", gamma, impl="reference").select_from_losses(losses, kept)
        assert chosen.indices[chosen.indices >= 0].tolist() == list(range(valid - count, valid))  # the largest losses
        assert (int(chosen.n_selected), int(chosen.n_valid)) == (count, valid)
        assert_consistent(chosen, gamma, False)


def test_ties_go_to_the_earlier_token_and_what_is_not_finite_is_not_chosen():
    losses = torch.tensor([[1.0, 2.0, 2.0, math.nan], [2.0, math.inf, 1.0, -math.inf]])
    chosen = TokenSelector("loss", 0.4, impl="reference").select_from_losses(losses)
    assert chosen.indices.tolist() == [1, 2, -1]  # gamma of 5, of 8 there is room
    by_row = TokenSelector("loss", 0.4, per_sequence=True, impl="reference").select_from_losses(losses)
    assert by_row.indices.tolist() == [1, 4, -1, -1]
    excess = TokenSelector("excess_loss", 0.9, impl="reference")
    reference = torch.tensor([[0.0, math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0, 0.0]])
    assert excess.select_from_losses(losses, reference=reference).indices.tolist()[:4] == [0, 2, 6, -1]
    # a class that is masked out has an infinite loss as the target, though its entropy is finite
    masked = torch.tensor([[[0.0, 0.0, -math.inf], [9.0, 0.0, -math.inf]]])
    entropy = TokenSelector("entropy", 0.5, impl="reference")
    assert entropy.select_from_logits(masked, torch.tensor([[2, 0]])).indices.tolist() == [1]
    # one class: no margin, so no token
    one = TokenSelector("margin", 0.5, impl="reference").select(
        torch.ones(1, 2, 3), torch.ones(1, 3), torch.zeros(1, 2).long()
    )
    assert one.indices.tolist() == [-1]


@pytest.mark.parametrize("rule", RULES)
def test_nothing_but_padding_trains_nothing(rule, generator):
    hidden, weight, targets, bias, reference = batch(generator, torch.float32)
    given = {"reference": reference} if rule == "excess_loss" else {}
    selector = TokenSelector(rule, 0.3, ignore_index=IGNORE, per_sequence=True, impl="reference")
    hidden.requires_grad_()
    chosen = selector.select(hidden, weight, torch.full_like(targets, IGNORE), bias, **given)
    assert (int(chosen.n_valid), int(chosen.n_selected)) == (0, 0)
    assert (chosen.indices == -1).all()
    loss = selected_linear_cross_entropy(
        hidden, weight, targets, chosen.indices, bias=bias, ignore_index=IGNORE, reduction="sum", impl="reference"
    )
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    targets[:] = IGNORE
    targets[2, 5] = 1  # one token
    assert selector.select(hidden, weight, targets, bias, **given).indices.tolist()[:2] == [2 * T + 5, -1]


def test_packed_tokens_and_half_precision(generator):
    hidden, weight, targets, bias, _ = batch(generator)
    selector = TokenSelector("loss", 0.3, ignore_index=IGNORE, impl="reference")
    flat = selector.select(hidden.flatten(0, 1), weight, targets.flatten(), bias)
    assert torch.equal(flat.indices, selector.select(hidden, weight, targets, bias).indices)
    assert flat.mask.shape == (B * T,)
    half = [x.bfloat16() for x in (hidden, weight, bias)]
    rounded = selector.select(half[0], half[1], targets.int(), half[2])
    again = selector.select(*(x.double() for x in half[:2]), targets, half[2].double())
    torch.testing.assert_close(rounded.losses, again.losses, rtol=1e-5, atol=1e-5)


def test_the_approximations_reach_the_scores(generator):
    hidden, weight, targets, _, _ = batch(generator, torch.float32)
    exact, rounded, strided = (
        TokenSelector("loss", 0.3, ignore_index=IGNORE, impl="reference", **more).select(hidden, weight, targets)
        for more in ({}, {"score_dtype": torch.bfloat16}, {"vocab_stride": 3})
    )
    kept = targets != IGNORE
    assert 0 < (exact.losses - rounded.losses)[kept].abs().max() < 0.2
    assert (exact.losses != strided.losses)[kept].any()


def test_reference_losses_make_the_excess_of_a_model_over_itself_zero(generator):
    hidden, weight, targets, bias, _ = batch(generator)
    selector = TokenSelector(
        "excess_loss", 0.3, ignore_index=IGNORE, label_smoothing=0.1, softcap=4.0, logit_scale=2.0, impl="reference"
    )
    reference = selector.reference_losses(hidden, weight, targets, bias)
    assert reference.shape == targets.shape
    assert (reference[targets == IGNORE] == 0).all()
    chosen = selector.select(hidden, weight, targets, bias, reference)
    assert (chosen.scores[targets != IGNORE] == 0).all()


@pytest.mark.parametrize("rule", ["adaselection", "uniform"])
def test_a_run_continues_from_a_file_bit_for_bit(rule, generator):
    losses = torch.rand(6, B, T, generator=generator)
    settings = {"per_sequence": True, "impl": "reference"}
    whole = TokenSelector(rule, 0.3, seed=11, **settings)
    expected = [whole.select_from_losses(x) for x in losses]
    first = TokenSelector(rule, 0.3, seed=11, score_dtype=torch.bfloat16, **settings)
    for x in losses[:3]:
        first.select_from_losses(x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = TokenSelector(rule, 0.3, seed=4, score_dtype=torch.bfloat16, **settings)
    second.load_state_dict(torch.load(file, weights_only=True))
    for x, wanted in zip(losses[3:], expected[3:], strict=True):
        chosen = second.select_from_losses(x)
        assert torch.equal(chosen.mask, wanted.mask)
        assert torch.equal(chosen.scores, wanted.scores)
    fresh = [whole.select_from_losses(losses[0]).mask for _ in range(8)]
    assert rule != "uniform" or any(not torch.equal(fresh[0], mask) for mask in fresh[1:])


@pytest.mark.parametrize(
    "other",
    [
        TokenSelector("loss", 0.3),
        TokenSelector("uniform", 0.4),
        TokenSelector("uniform", 0.3, per_sequence=True),
        TokenSelector("uniform", 0.3, score_dtype=torch.float16),
    ],
    ids=["rule", "gamma", "quota", "score_dtype"],
)
def test_a_foreign_state_is_refused(other):
    selector = TokenSelector("uniform", 0.3, impl="reference")
    selector.select_from_losses(torch.rand(2, 3))
    before = selector.state.buffer.numpy().tobytes()
    with pytest.raises(ValueError, match="settings"):
        selector.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="policy 'big_loss'"):
        selector.load_state_dict(selector.state_dict() | {"policy": "big_loss"})
    assert selector.state.buffer.numpy().tobytes() == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rule": "perplexity"}, ValueError, "rule must be one of 'loss'.*got 'perplexity'"),
        ({"gamma": 0.0}, ValueError, "gamma"),
        ({"per_sequence": 1}, TypeError, "per_sequence must be a bool, got 1"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index"),
        ({"score_dtype": torch.float32}, ValueError, "score_dtype"),
        ({"vocab_stride": 0}, ValueError, "vocab_stride must be at least 1, got 0"),
        ({"rule": "margin", "vocab_stride": 2}, ValueError, "margin need the largest of all logits"),
        ({"methods": ("loss",)}, ValueError, "methods"),
        ({"options": {}}, TypeError, "options"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"order": "score"}, TypeError, "order"),
    ],
)
def test_settings_are_refused_when_the_selector_is_made(settings, error, message):
    with pytest.raises(error, match=message):
        TokenSelector(**({"rule": "loss", "gamma": 0.5} | settings))


def test_inputs_are_refused_and_the_state_is_as_before(generator):
    hidden, weight, targets, bias, reference = batch(generator)
    loss = TokenSelector("loss", 0.5, ignore_index=IGNORE, impl="reference")
    excess = TokenSelector("excess_loss", 0.5, ignore_index=IGNORE, impl="reference")
    quota = TokenSelector("loss", 0.5, per_sequence=True, ignore_index=IGNORE, impl="reference")
    entropy = TokenSelector("entropy", 0.5, impl="reference")
    grad_norm = TokenSelector("adaselection", 0.5, methods=("grad_norm",), impl="reference")
    losses = torch.rand(B, T)
    for error, message, call in (
        (ValueError, "takes no reference", lambda: loss.select(hidden, weight, targets, bias, reference)),
        (ValueError, "needs reference losses", lambda: excess.select(hidden, weight, targets, bias)),
        (
            ValueError,
            r"reference must be \(3, 11\)",
            lambda: excess.select(hidden, weight, targets, bias, reference[0]),
        ),
        (TypeError, "tensor of floats", lambda: excess.select(hidden, weight, targets, bias, targets)),
        (ValueError, "sequences", lambda: quota.select(hidden[0], weight, targets[0])),
        (ValueError, "sequences", lambda: quota.select_from_losses(losses.flatten())),
        (ValueError, "targets must have the shape", lambda: loss.select(hidden, weight, targets[:, 1:])),
        (ValueError, r"\[V, H\]", lambda: loss.select(hidden, weight[:, 1:], targets)),
        (IndexError, "outside", lambda: loss.select(hidden, weight, targets + V)),
        (TypeError, "logits must be", lambda: loss.select_from_logits(targets, targets[0])),
        (ValueError, "do not serve the rule 'entropy'", lambda: entropy.select_from_losses(losses)),
        (ValueError, "do not serve the rule 'adaselection'", lambda: grad_norm.select_from_losses(losses)),
        (TypeError, "losses must be a tensor", lambda: loss.select_from_losses(1.0)),
        (ValueError, r"\[B, T\] or \[N\]", lambda: loss.select_from_losses(losses[None])),
        (TypeError, "valid must be a bool", lambda: loss.select_from_losses(losses, losses)),
        (ValueError, "valid must be like", lambda: loss.select_from_losses(losses, losses[0] > 0)),
    ):
        with pytest.raises(error, match=message):
            call()
    assert all(s.state.step == 1 for s in (loss, excess, quota, entropy, grad_norm))
    loss.select_from_losses(losses)
    with pytest.raises(ValueError, match="device"):
        loss.select_from_losses(losses.to("meta"))


def test_a_whole_step_is_one_graph(generator):
    """Score, choose, loss and backward: no break, no synchronisation, as CUDA graphs need them; without and with a state
    that equations read, in one compilation because it is the dear part."""
    selectors = [
        [TokenSelector(rule, 0.3, per_sequence=True, ignore_index=IGNORE) for _ in "ab"]
        for rule in ("excess_loss", "adaselection")
    ]
    plain, traced = zip(*selectors, strict=True)

    def step(excess, adaselection, hidden, weight, targets, reference):
        chosen = [
            excess.select(hidden, weight, targets, reference=reference),
            adaselection.select(hidden, weight, targets),
        ]
        settings = {"ignore_index": IGNORE}
        losses = [selected_linear_cross_entropy(hidden, weight, targets, c.indices, **settings) for c in chosen]
        return sum(losses), chosen[0].mask, chosen[1].mask

    compiled = torch.compile(lambda *inputs: step(*traced, *inputs), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        hidden, weight, targets, _, reference = batch(generator, torch.float32)
        leaves = [[x.clone().requires_grad_() for x in (hidden, weight)] for _ in "ab"]
        loss, *masks = step(*plain, *leaves[0], targets, reference)
        other, *same_masks = compiled(*leaves[1], targets, reference)
        assert all(torch.equal(a, b) for a, b in zip(masks, same_masks, strict=True))
        torch.testing.assert_close(loss, other)
        loss.backward()
        other.backward()
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert not leaves[1][0].grad[~(masks[0] | masks[1])].any()
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a.state.buffer, b.state.buffer, equal_nan=True)
    assert traced[0].state.step == 3
