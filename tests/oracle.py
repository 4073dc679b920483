"""What a right answer is: element-wise comparison with the float64 oracle, within PyTorch's own error.

The budget of an element is twice the largest error of the same eager PyTorch computation in float32 over the batch, plus
one rounding of the value (contract item 8). A batch that PyTorch happens to get exactly right still grants the roundings
that e^(z - m) brings at |z - m| of 8 to a typical value, and one rounding of the largest (most confidences are tiny, a few
are not), or a lucky draw would fail a right answer. Scores and state depend on the whole batch, and where its losses are close
to each other by much more than a rounding on each of them: there the peer errs, element by element, by at least what one
rounding of every loss and gradient norm moves in the oracle. A selection must be exactly the k best of the scores it returns,
and no row left out may beat a chosen one by more than the budget.
"""

import copy
import math
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from adaselect_kernels import AdaSelectionOptions, AdaSelectionState, Selection, reference
from adaselect_kernels.options import METHODS, STATS

LOSS_AND_GRAD_NORM = (STATS.index("loss"), STATS.index("grad_norm"))
EPS32 = torch.finfo(torch.float32).eps


def assert_within_budget(got: Tensor, oracle: Tensor, peer: Tensor, what: str) -> None:
    """|got - oracle| <= 2 max(max |peer - oracle|, 8 eps mean |oracle|, eps max |oracle|) + eps |oracle|; NaN and
    infinities agree."""
    eps = torch.finfo(got.dtype).eps
    got, oracle, peer = got.double(), oracle.double(), peer.double()
    finite = oracle.isfinite()
    assert torch.equal(got[~finite].nan_to_num(nan=12345.0), oracle[~finite].nan_to_num(nan=12345.0)), what
    assert got[finite].isfinite().all(), f"{what}: not finite where the oracle is"
    if not finite.any():
        return
    usable = finite & peer.isfinite()
    peer_error = (peer - oracle)[usable].abs().max().item() if usable.any() else 0.0
    size = oracle[finite].abs()
    peer_error = max(peer_error, 8 * eps * size.mean().item(), eps * size.max().item())
    error = (got - oracle)[finite].abs()
    allowed = 2 * peer_error + eps * oracle[finite].abs() + torch.finfo(torch.float32).tiny
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{what}: element {int(worst)} is {got[finite][worst]:.9g}, oracle {oracle[finite][worst]:.9g},"
        f" error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )


def assert_statistic(name: str, got: Tensor, oracle: Tensor, peer: Tensor, of: str = "") -> None:
    """assert_within_budget of a row statistic, a confidence by its relative error: confidences span magnitudes, and all are
    rounded in the exponent, so that the budget of the largest would decide for all, and by the luck of one row."""
    if name == "confidence":
        normal = oracle > torch.finfo(torch.float32).tiny
        got, peer = (torch.where(normal, x.double() / oracle.double(), x).to(got.dtype) for x in (got, peer))
        oracle = torch.where(normal, 1.0, oracle)
    assert_within_budget(got, oracle, peer, f"{name} {of}".rstrip())


def drawn_targets(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A class for each row [..., C]: the largest for every other one, so that it is right as often as wrong; else any."""
    targets = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
    targets[::2] = logits[::2].argmax(-1)
    return targets


def naive_stats(logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float) -> dict[str, Tensor]:
    """The eager PyTorch computation in float32 (float64 for float64), [rows, C] with targets in range or ignored."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    kept = targets != ignore_index
    y = torch.where(kept, targets.long(), 0)
    one_hot = F.one_hot(y, z.shape[1]).bool()
    p = z.softmax(1)
    log_p = z.log_softmax(1)
    z_y = z.gather(1, y[:, None])[:, 0]
    top = z.topk(min(2, z.shape[1]), 1).values
    stats = {
        "loss": F.cross_entropy(z, y, reduction="none", label_smoothing=label_smoothing),
        "lse": z.logsumexp(1),
        "grad_norm": (p - one_hot.to(p.dtype)).norm(dim=1),
        "margin": z_y - z.masked_fill(one_hot, -math.inf).amax(1),
        "top2_margin": top[:, 0] - top[:, 1] if z.shape[1] > 1 else torch.full_like(z_y, math.inf),
        "entropy": -torch.where(p == 0, 0.0, p * log_p).sum(1),
        "confidence": p.gather(1, y[:, None])[:, 0],
        "correct": (z.argmax(1) == y).to(z.dtype),
    }
    return {name: torch.where(kept, value, 0.0) for name, value in stats.items()}


def oracle_stats(logits, targets, names, unit="sample", ignore_index=-100, label_smoothing=0.0) -> Tensor:
    codes = [STATS.index(name) for name in names]
    return reference.per_sample_stats(logits.double(), targets, codes, unit, ignore_index, float(label_smoothing))


def rounded_runs(losses, grad_norms, valid, state, *arguments, eps: float):
    """Yield (scores, buffer of the state) of the batch stage with losses, gradient norms and keys off by a rounding, eight times.

    x (1 + d), eps / 2 <= |d| <= eps: of losses and gradient norms alike where they are equal, of the keys by which a method
    chooses the rows of its own loss in every row, and four times as much (a distance to the mean has the mean's rounding too),
    so that d and -d turn over a tie: either row is right.
    """
    generator = torch.Generator().manual_seed(0)
    places = [values.unique(return_inverse=True)[1] for values in (losses, grad_norms)]
    exact_key = reference.baseline_key
    for _ in range(4):
        d = torch.rand(3, len(losses), generator=generator, dtype=torch.float64).to(losses.device) - 0.5
        d = eps * (d + 0.5 * d.sign())
        d[2] *= 4
        for off in (1 + d, 1 - d):
            buffer = None if state is None else state.buffer.clone()
            rounded = losses * off[0, places[0]], grad_norms * off[1, places[1]]
            with mock.patch.object(reference, "baseline_key", lambda *args, off=off[2]: off * exact_key(*args)):
                scores, _ = reference.batch_scores(*rounded, valid, buffer, *arguments)
            yield scores, buffer


def farthest(peer: Tensor, other: Tensor, oracle: Tensor) -> Tensor:
    """Element by element, which of two peers is farther from the oracle."""
    return torch.where((other - oracle).abs() > (peer - oracle).abs(), other, peer)


def expected_count(gamma: float, n: int) -> int:
    return max(1, min(n, math.floor(gamma * n + 0.5)))


def check_fused_select(
    select,
    logits: Tensor,
    targets: Tensor,
    gamma: float,
    *,
    methods=("big_loss", "small_loss", "uniform"),
    state: AdaSelectionState | None = None,
    options: AdaSelectionOptions | None = None,
    unit="sample",
    order="index",
    ignore_index=-100,
    label_smoothing=0.0,
    seed=0,
) -> Selection:
    """Run `select` (a fused_select) once and compare everything it returns and leaves behind with the oracle."""
    options = options or AdaSelectionOptions()
    oracle_state, peer_state, state_before = (copy.deepcopy(state) for _ in range(3))
    before = logits.clone(), targets.clone()
    got = select(
        logits, targets, gamma, methods=methods, state=state, options=options, unit=unit, order=order,
        ignore_index=ignore_index, label_smoothing=label_smoothing, seed=seed,
    )  # fmt: skip
    assert torch.equal(logits.nan_to_num(nan=7.5), before[0].nan_to_num(nan=7.5)), "logits were written"
    assert torch.equal(targets, before[1]), "targets were written"

    n = targets.numel() if unit == "token" else targets.shape[0]
    k = expected_count(gamma, n)
    arguments = ([METHODS.index(name) for name in methods], k, seed if state is None else state.seed, options.packed)
    dtype = reference.compute_dtype(logits.dtype)
    valid = reference.valid_samples(targets, unit, ignore_index)
    rows, peer_rows = (
        reference.per_sample_stats(z, targets, LOSS_AND_GRAD_NORM, unit, ignore_index, float(label_smoothing))
        for z in (logits.double(), logits.to(dtype))
    )
    (oracle_scores, oracle_valid), (peer_scores, _) = (
        reference.batch_scores(*stats, valid, None if state is None else its_state.buffer, *arguments)
        for stats, its_state in ((rows, oracle_state), (peer_rows, peer_state))
    )

    assert got.losses.dtype == got.scores.dtype == torch.float32
    assert got.indices.dtype == got.n_valid.dtype == torch.int64
    assert got.losses.shape == got.scores.shape == (n,)
    assert got.n_valid.shape == ()
    assert not any(t.requires_grad for t in got)
    assert_within_budget(got.losses, rows[0], peer_rows[0], "losses")
    assert int(got.n_valid) == int(oracle_valid)

    def check_against(peer_scores: Tensor) -> None:
        allowed = check_scores(got.scores, oracle_scores, peer_scores, rows[0])
        check_choice(got.indices, got.scores, oracle_scores, k, order, allowed)
        if state is not None:
            check_state(state, oracle_state, peer_state)

    try:
        check_against(peer_scores)
    except AssertionError:  # the roundings take time, and only widen the budget
        for scores, buffer in rounded_runs(*rows, valid, state_before, *arguments, eps=torch.finfo(dtype).eps):
            peer_scores = farthest(peer_scores, scores, oracle_scores)
            if state is not None:
                peer_state.buffer.copy_(farthest(peer_state.buffer, buffer, oracle_state.buffer))
        check_against(peer_scores)
    return got


def check_scores(got: Tensor, oracle: Tensor, peer: Tensor, losses: Tensor) -> float:
    """|got - oracle| <= 2 max |peer - oracle| + 4 eps (1 + max |l|) max score: one rounding of a loss moves e^l by eps |l|."""
    assert torch.equal(got.isneginf(), oracle.isneginf()), "the valid rows differ"
    finite = ~oracle.isneginf()
    if not finite.any():
        return 0.0
    scale = oracle[finite].double().abs().max().item()
    peer_error = (peer.double() - oracle.double())[finite].abs().max().item()
    error = (got.double() - oracle.double())[finite].abs().max().item()
    allowed = 2 * peer_error + 4 * EPS32 * (1 + losses[finite].abs().max().item()) * scale
    assert error <= allowed, f"scores: error {error:.3g} of {scale:.3g}, allowed {allowed:.3g}"
    return allowed


def check_choice(indices: Tensor, scores: Tensor, oracle: Tensor, k: int, order: str, allowed: float) -> None:
    assert indices.shape == (k,), f"{len(indices)} rows chosen, expected {k}"
    assert len(indices.unique()) == k, "an index is repeated"
    best_first = torch.sort(scores, descending=True, stable=True).indices[:k]
    expected = best_first.sort().values if order == "index" else best_first
    assert torch.equal(indices, expected), "not the k best of the returned scores, ties to the lower row"
    out = torch.ones_like(oracle, dtype=torch.bool).index_fill(0, indices, False)
    if out.any() and not oracle[indices].isneginf().any():
        assert oracle[indices].min() >= oracle[out].max() - 2 * allowed, "a better row was left out"


def check_state(got: AdaSelectionState, oracle: AdaSelectionState, peer: AdaSelectionState) -> None:
    assert torch.equal(got.step, oracle.step), f"step {got.step}, expected {oracle.step}"
    assert_within_budget(got.previous_losses, oracle.previous_losses, _loosened(peer, oracle, "previous_losses"), "L")
    assert_within_budget(got.log_weights, oracle.log_weights, _loosened(peer, oracle, "log_weights"), "log w")


def _loosened(peer, oracle, name) -> Tensor:
    """The state is float64, its inputs are float32: the peer's error is at least a few float32 roundings."""
    mine, right = getattr(peer, name), getattr(oracle, name)
    least = 4 * EPS32 * (1 + right.abs())
    return torch.where((mine - right).abs() < least, right + least, mine)
