"""The oracle: every operator of ops.py in plain torch, obvious and slow, on any device and in any float dtype.

Call it with float64 inputs to get the float64 oracle. It shares no code with the kernels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaselect_kernels.options import ADABOOST_EPS, METHODS, PARTIALS, STATS, STD_EPS, PackedOptions

_MASK32 = 0xFFFFFFFF


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def philox_uniform(rows: int, step: Tensor, seed: int) -> Tensor:
    """u [rows] float64 in (0, 1), exact in float32: Philox 4x32-10, key = seed, counter = (row, step low, step high, 0).

    Salmon et al. 2011. u = (floor(b / 512) + 0.5) 2^-23 of the first output word b.
    """
    counter = torch.arange(rows, device=step.device, dtype=torch.int64)
    step = step.to(torch.int64)
    c0, c1, c2, c3 = counter, (step & _MASK32).expand(rows), (step >> 32).expand(rows), torch.zeros_like(counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64: the high word is masked out
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return ((c0 >> 9).to(torch.float64) + 0.5) * 2.0**-23


def valid_samples(targets: Tensor, unit: str, ignore_index: int) -> Tensor:
    """[N] bool: samples with at least one position that is not ignored."""
    kept = targets != ignore_index
    if kept.dim() == 2:
        kept = kept.flatten() if unit == "token" else kept.any(1)
    return kept


def per_sample_stats(
    logits: Tensor, targets: Tensor, stats: Sequence[int], unit: str, ignore_index: int, label_smoothing: float
) -> Tensor:
    classes = logits.shape[-1]
    z = logits.reshape(-1, classes).to(compute_dtype(logits.dtype))
    y = targets.reshape(-1).to(torch.int64)
    kept = y != ignore_index
    bad = kept & ((y < 0) | (y >= classes))
    if z.device.type == "cpu" and not torch.compiler.is_compiling() and bad.any():
        row = int(bad.to(torch.int8).argmax())
        raise IndexError(
            f"target {int(y[row])} of row {row} is outside [0, {classes}) and not ignore_index={ignore_index}"
        )
    y = torch.where(kept & ~bad, y, 0)
    is_target = torch.arange(classes, device=z.device) == y[:, None]

    m = z.amax(1)
    x = z - m[:, None]  # z_j - m
    e = x.exp()
    s1 = e.masked_fill(is_target, 0.0).sum(1)
    z_others = z.masked_fill(is_target, -math.inf)
    m_others = z_others.amax(1)
    e_y = e.gather(1, y[:, None])[:, 0]
    z_y = z.gather(1, y[:, None])[:, 0]
    d = s1 + e_y
    log_d = torch.where(e_y == 1, s1.log1p(), d.log())
    nll = log_d - (z_y - m)
    two = z.topk(min(2, classes), dim=1).values
    first = torch.where(z == m[:, None], torch.arange(classes, device=z.device), classes).amin(1)
    columns = {
        "loss": nll,
        "lse": m + log_d,
        "grad_norm": _root_of_others(z_others, m_others) * (m_others - m).exp() / d,
        "margin": z_y - m_others,
        "top2_margin": two[:, 0] - two[:, 1] if classes > 1 else torch.full_like(m, math.inf),
        "entropy": log_d - torch.where(e == 0, 0.0, e * x).sum(1) / d,
        "confidence": e_y / d,  # = exp(-nll), one rounding less
        "correct": (first == y).to(z.dtype),
    }
    if label_smoothing > 0:  # (1 - eps) nll + eps / C sum_j (lse - z_j)
        columns["loss"] = (1 - label_smoothing) * nll + label_smoothing * (log_d - x.sum(1) / classes)
    rows = [torch.where(bad, math.nan, torch.where(kept, columns[STATS[i]], 0.0)) for i in stats]
    if logits.dim() == 3 and unit == "sample":
        kept = kept.view(logits.shape[:2])
        rows = [mean_over_positions(STATS[i], row.view(kept.shape), kept) for i, row in zip(stats, rows, strict=True)]
    return torch.stack(rows)


def _root_of_others(z: Tensor, largest: Tensor) -> Tensor:
    """sqrt(S1^2 + S2) of e^(z - largest): at least 1, where the squares of e^(z - m) may be too small for the type."""
    e = torch.where(largest[:, None] == -math.inf, 0.0, (z - largest[:, None]).exp())
    return (e.sum(1).square() + e.square().sum(1)).sqrt()


def batch_scores(
    losses: Tensor,
    grad_norms: Tensor | None,
    valid: Tensor | None,
    state: Tensor | None,
    methods: Sequence[int],
    k: int,
    seed: int,
    options: Sequence[float],
) -> tuple[Tensor, Tensor]:
    opts = PackedOptions.unpack(options)
    names = [METHODS[i] for i in methods]
    dtype = compute_dtype(losses.dtype)
    ok = losses.isfinite() if valid is None else losses.isfinite() & valid
    if "grad_norm" in names:
        assert grad_norms is not None
        ok = ok & grad_norms.isfinite()
        grad_norms = torch.where(ok, grad_norms.to(dtype), 0.0)
    losses = torch.where(ok, losses.to(dtype), 0.0)
    n_valid = ok.sum()
    m = len(names)
    if state is None:
        state = torch.tensor([-math.log(m)] * m + [math.nan] * m + [1.0], dtype=torch.float64, device=losses.device)
    noise = -philox_uniform(len(losses), state[2 * m], seed).to(dtype).log() if "uniform" in names else None

    if opts.baseline:
        scores = baseline_key(names[0], losses, grad_norms, ok, noise)
    else:
        importances = [importance(name, losses, grad_norms, ok, noise, opts) for name in names]
        if opts.method_loss == 0:
            method_losses = torch.stack([(alpha * losses).sum() for alpha in importances])
        else:
            chosen = [baseline_topk(name, losses, grad_norms, ok, noise, k) for name in names]
            method_losses = torch.stack([losses[rows][ok[rows]].mean() for rows in chosen])
        method_losses = torch.where(n_valid > 0, method_losses.to(torch.float64), math.nan)
        weights = update_weights(state, m, method_losses, opts)
        scores = sum(weights[i].to(dtype) * importances[i] for i in range(m)) * reward(
            losses, n_valid, state[2 * m], opts
        )
    scores = torch.where(ok, scores, -math.inf).to(torch.float32)
    state[2 * m] += 1
    return scores, n_valid


def _mean_std(values: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
    count = ok.sum()
    mean = values.sum() / count  # values are 0 on invalid rows
    return mean, (torch.where(ok, values - mean, 0.0).square().sum() / count).sqrt()


def importance(name: str, losses: Tensor, grad_norms: Tensor | None, ok: Tensor, noise: Tensor | None, opts) -> Tensor:
    """alpha [N] of one method: sums to 1 over valid rows, 0 on the others."""

    def standardized(values: Tensor) -> Tensor:
        if not opts.standardize:
            return values
        mean, std = _mean_std(values, ok)
        return (values - mean) / (std + STD_EPS)

    def softmax(values: Tensor) -> Tensor:
        values = torch.where(ok, values / opts.temperature, -math.inf)
        e = torch.where(ok, (values - values.max()).exp(), 0.0)
        return e / e.sum()

    def normalized(values: Tensor) -> Tensor:
        values = torch.where(ok, values, 0.0)
        total = values.sum()
        return torch.where(total == 0, ok.to(values.dtype) / ok.sum(), values / total)

    if name == "big_loss":
        return softmax(standardized(losses))
    if name == "small_loss":
        return softmax(-standardized(losses))
    if name == "grad_norm":
        assert grad_norms is not None
        return softmax(standardized(grad_norms))
    if name == "adaboost":
        return normalized(adaboost_key(losses, ok))
    if name == "coreset1":
        u = standardized(losses)
        return 0.5 * softmax(u) + 0.5 * softmax(-u)
    if name == "coreset2":
        u = standardized(losses)
        mean, _ = _mean_std(torch.where(ok, u, 0.0), ok)
        return softmax(-(u - mean).abs())
    assert noise is not None
    return normalized(noise)


def adaboost_key(losses: Tensor, ok: Tensor) -> Tensor:
    """a = 0.5 log((1 + t) / (1 - t)) of t = max(l, 0) / ((1 + eps) max l).

    Written as 0.5 log(((1 + eps) max + l) / ((max - l) + eps max)), which does not cancel at l = max.
    """
    top = torch.where(ok, losses, -math.inf).max()
    positive = losses.clamp(min=0)
    a = 0.5 * (((1 + ADABOOST_EPS) * top + positive) / ((top - positive) + ADABOOST_EPS * top)).log()
    return torch.where(ok & (top > 0), a, 0.0)


def baseline_key(name: str, losses: Tensor, grad_norms: Tensor | None, ok: Tensor, noise: Tensor | None) -> Tensor:
    """[N]: the method's k largest are its choice (coreset1 chooses from both ends: its key is the larger distance
    from the middle of the range, for reporting; `baseline_topk` makes the choice)."""
    if name == "big_loss":
        return losses
    if name == "small_loss":
        return -losses
    if name == "grad_norm":
        assert grad_norms is not None
        return grad_norms
    if name == "adaboost":
        return adaboost_key(losses, ok)
    if name == "coreset1":
        high = torch.where(ok, losses, -math.inf).max()
        low = torch.where(ok, losses, math.inf).min()
        return torch.maximum(losses - low, high - losses)
    if name == "coreset2":
        return -(losses - _mean_std(losses, ok)[0]).abs()
    assert noise is not None
    return noise


def baseline_topk(
    name: str, losses: Tensor, grad_norms: Tensor | None, ok: Tensor, noise: Tensor | None, k: int
) -> Tensor:
    """[k] rows the method alone chooses; invalid rows come last, ties go to the lower row."""
    if name != "coreset1":
        key = torch.where(ok, baseline_key(name, losses, grad_norms, ok, noise), -math.inf)
        return select_topk(key, k, True, "score")
    largest = select_topk(torch.where(ok, losses, -math.inf), k - k // 2, True, "score")
    rest = torch.where(ok, -losses, -math.inf).index_fill(0, largest, math.nan)  # NaN: after the invalid rows
    return torch.cat([largest, select_topk(rest, k // 2, True, "score")]) if k > 1 else largest


def update_weights(state: Tensor, m: int, method_losses: Tensor, opts: PackedOptions) -> Tensor:
    """Equation 3 on state = (log w, L, t), in place; returns the new w [m] float64."""
    log_w, previous = state[:m], state[m : 2 * m]
    if opts.update == 0:
        increment = (previous - method_losses) / previous
    else:
        positive = (previous > 0) & (method_losses > 0)
        increment = torch.where(positive, (previous / method_losses).log(), math.nan)
    log_w = torch.where(increment.isfinite(), log_w + opts.beta * increment, log_w)
    log_w = log_w - log_w.logsumexp(0)
    if opts.weight_floor > 0:
        log_w = _apply_floor(log_w.exp(), opts.weight_floor / m).log()
    state[:m] = log_w
    state[m : 2 * m] = torch.where(method_losses.isfinite(), method_losses, previous)
    return log_w.exp()


def _apply_floor(weights: Tensor, floor: float) -> Tensor:
    """Clip at `floor` and rescale the rest to keep the sum 1; repeated, as the rescaling can push another one below."""
    clipped = torch.zeros_like(weights, dtype=torch.bool)
    scaled = weights
    for _ in range(len(weights)):
        clipped = clipped | (scaled <= floor)
        rest = torch.where(clipped, 0.0, weights)
        share = 1 - floor * clipped.sum().to(weights.dtype)
        scaled = torch.where(clipped, floor, rest * (share / rest.sum()))
    return scaled / scaled.sum()


def reward(losses: Tensor, n_valid: Tensor, step: Tensor, opts: PackedOptions) -> Tensor | float:
    """r [N] of equation 4; 1 without a curriculum or when the losses are all zero."""
    if math.isnan(opts.curriculum_power):
        return 1.0
    total = losses.square().sum()
    scale = total if opts.curriculum_scale == 0 else (total / n_valid).sqrt()
    strength = (step**opts.curriculum_power).to(losses.dtype)
    return torch.where(total > 0, (-strength * losses / scale).exp(), 1.0)


def select_topk(scores: Tensor, k: int, largest: bool, order: str) -> Tensor:
    ranked = torch.sort(scores, descending=largest, stable=True).indices
    nan_last = torch.sort(scores.isnan()[ranked].to(torch.int8), stable=True).indices
    chosen = ranked[nan_last][:k]
    return chosen.sort().values if order == "index" else chosen


def select_from_losses(losses, grad_norms, state, methods, k, order, seed, options) -> tuple[Tensor, Tensor, Tensor]:
    scores, n_valid = batch_scores(losses, grad_norms, None, state, methods, k, seed, options)
    return _choose(losses, None, scores, methods, k, order, options), scores, n_valid


def fused_select(
    logits, targets, state, methods, k, unit, order, ignore_index, label_smoothing, seed, options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = (STATS.index("loss"), STATS.index("grad_norm"))
    losses, grad_norms = per_sample_stats(logits, targets, wanted, unit, ignore_index, label_smoothing)
    valid = valid_samples(targets, unit, ignore_index)
    scores, n_valid = batch_scores(losses, grad_norms, valid, state, methods, k, seed, options)
    return _choose(losses, valid, scores, methods, k, order, options), scores, losses.to(torch.float32), n_valid


def _choose(losses, valid, scores, methods, k, order, options) -> Tensor:
    if not (PackedOptions.unpack(options).baseline and METHODS[methods[0]] == "coreset1"):
        return select_topk(scores, k, True, order)
    ok = losses.isfinite() if valid is None else losses.isfinite() & valid
    chosen = baseline_topk("coreset1", torch.where(ok, losses, 0.0), None, ok, None, k)
    if order == "index":
        return chosen.sort().values
    taken = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, chosen, True)
    return select_topk(torch.where(taken, scores, math.nan), k, True, "score")


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, logit_scale: float,
    hidden_scale: Tensor | None = None, weight_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """z = softcap tanh(u / softcap), u = logit_scale (hidden weight^T + bias), stored, in the dtype of the statistics."""
    dtype = compute_dtype(hidden.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden_scale is not None and weight_scale is not None:
        hidden, weight = hidden * hidden_scale[:, None], weight * weight_scale[:, None]
    u = _product(hidden, weight.T)
    if bias is not None:
        u = u + bias.to(dtype)
    if logit_scale != 1.0:
        u = u * logit_scale
    return softcap * (u / softcap).tanh() if softcap > 0 else u


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, which torch.autocast would round."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def linear_per_sample_stats(
    hidden, weight, targets, bias, stats, unit, ignore_index, label_smoothing, softcap, logit_scale
) -> Tensor:
    logits = linear_logits(hidden, weight, bias, softcap, logit_scale)
    return per_sample_stats(logits, targets, stats, unit, ignore_index, label_smoothing)


def fused_linear_select(
    hidden, weight, targets, bias, state, methods, k, unit, order, ignore_index, label_smoothing, softcap, logit_scale,
    seed, options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits = linear_logits(hidden, weight, bias, softcap, logit_scale)
    return fused_select(logits, targets, state, methods, k, unit, order, ignore_index, label_smoothing, seed, options)


def linear_partials(
    hidden, weight, targets, bias, hidden_scale, weight_scale, first_class, class_stride, stats, ignore_index,
    label_smoothing, softcap, logit_scale,
) -> Tensor:  # fmt: skip
    z = linear_logits(hidden, weight, bias, softcap, logit_scale, hidden_scale, weight_scale)
    y = targets.to(torch.int64)[:, None]
    classes = first_class + class_stride * torch.arange(weight.shape[0], device=z.device)
    is_target = classes == y
    others = z.masked_fill(is_target, -math.inf)
    lowest = others.new_full((len(others), 2), -math.inf)
    two = torch.cat([others, lowest], 1).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).topk(2, 1).values
    m, empty = two[:, :1], two[:, :1] == -math.inf
    x = torch.where(is_target, 0.0, z - torch.where(empty, 0.0, m))
    e = torch.where(is_target, 0.0, x.exp())
    count = (~is_target).sum(1)
    rows = {
        "max": m[:, 0],
        "sum": e.sum(1),
        "sum_sq": e.square().sum(1),
        "sum_ex": torch.where(e == 0, 0.0, e * x).sum(1),
        "second": two[:, 1],
        "before": torch.where(classes < y, others, -math.inf).amax(1),
        "sum_x": torch.where(empty[:, 0], 0.0, x.sum(1)),
        "target": torch.where(is_target, z, 0.0).sum(1),
        "count": count.to(z.dtype),
        "nan": z.isnan().any(1).to(z.dtype),
    }
    return torch.stack([rows[name] for name in PARTIALS])


def combine_partials(partials, targets, classes, stats, ignore_index, label_smoothing) -> Tensor:
    p = dict(zip(PARTIALS, partials.unbind(1), strict=True))  # [R, N] each
    y = targets.to(torch.int64)
    kept = y != ignore_index
    bad = kept & ((y < 0) | (y >= classes))
    z_y, has_nan = p["target"].sum(0), p["nan"].amax(0) > 0
    m_others = p["max"].amax(0)
    m = torch.maximum(m_others, z_y)
    shift = torch.where(p["max"] == -math.inf, -math.inf, p["max"] - m)  # of each set's origin to m
    scale = shift.exp()
    # sum e_j over j != y relative to m, and so on
    s1 = (scale * p["sum"]).sum(0)
    # relative to m_others, where their squares are not too small for the type
    near = torch.where(p["max"] == -math.inf, 0.0, (p["max"] - m_others).exp())
    root = ((near * p["sum"]).sum(0).square() + (near.square() * p["sum_sq"]).sum(0)).sqrt()
    ex = torch.where(scale == 0, 0.0, scale * (p["sum_ex"] + p["sum"] * shift)).sum(0)
    sum_x = torch.where(p["count"] == 0, 0.0, p["sum_x"] + p["count"] * shift).sum(0)
    x_y = z_y - m
    e_y = x_y.exp()
    d = s1 + e_y
    log_d = torch.where(e_y == 1, s1.log1p(), d.log())
    nll = log_d - x_y
    nan = torch.full_like(nll, math.nan)
    runner_up = torch.cat([p["max"], p["second"]]).topk(2, 0).values[1]
    runner_up = torch.where(z_y >= m_others, m_others, torch.maximum(z_y, runner_up))
    first = (y == 0) | (z_y > p["before"].amax(0))  # no lower class reaches z_y
    columns = {
        "loss": nll,
        "lse": m + log_d,
        "grad_norm": root * (m_others - m).exp() / d,
        "margin": torch.where(has_nan, nan, z_y - m_others),
        "top2_margin": torch.where(has_nan, nan, m - runner_up) if classes > 1 else torch.full_like(m, math.inf),
        "entropy": log_d - (ex + torch.where(e_y == 0, 0.0, e_y * x_y)) / d,
        "confidence": e_y / d,
        "correct": (first & (z_y >= m_others) & ~has_nan).to(z_y.dtype),
    }
    if label_smoothing > 0:
        columns["loss"] = (1 - label_smoothing) * nll + label_smoothing * (log_d - (sum_x + x_y) / classes)
    for name in ("loss", "lse", "grad_norm", "entropy", "confidence"):
        columns[name] = torch.where(has_nan, nan, columns[name])
    return torch.stack([torch.where(bad, math.nan, torch.where(kept, columns[STATS[i]], 0.0)) for i in stats])


def mean_over_positions(stat: str, values: Tensor, kept: Tensor) -> Tensor:
    """[N] from the values [N, T] of its positions: the mean over those kept, of grad_norm the norm for the mean loss."""
    count = kept.sum(1)
    if stat == "grad_norm":
        mean = (values * 2.0**50).square().sum(1).sqrt() * 2.0**-50 / count  # squares of small norms keep their digits
    else:
        mean = values.sum(1) / count
    return torch.where(count > 0, mean, 0.0)


def logits_gradient(
    row_weight, z, targets, lse, first_class, classes, label_smoothing, softcap, logit_scale, z_loss, normaliser=1.0
) -> Tensor:
    """d/du of sum_i w_i l_i [N, V] from z, for classes from first_class on; normaliser: sum_j e^(z_j - lse), where known."""
    weight = row_weight.to(z.dtype)[:, None]
    columns = first_class + torch.arange(z.shape[1], device=z.device)
    high = lse.to(z.dtype)[:, None]
    p = ((z - high) - (lse[:, None] - high).to(z.dtype)).exp() / normaliser
    grad = p * (1 + 2 * z_loss * high) - label_smoothing / classes
    grad = grad - (1 - label_smoothing) * (columns == targets[:, None]).to(z.dtype)
    if softcap > 0:
        grad = grad * (1 - (z / softcap).square())  # dz/du
    return torch.where(weight == 0, 0.0, weight * grad * logit_scale)


def cross_entropy_backward(row_weight, logits, targets, lse, label_smoothing, softcap, z_loss) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    z = softcap * (z / softcap).tanh() if softcap > 0 else z
    # at a large offset lse has lost digits that the quotient has not
    normaliser = (z - lse[:, None]).exp().sum(1, keepdim=True)
    grad = logits_gradient(
        row_weight, z, targets, lse, 0, z.shape[1], label_smoothing, softcap, 1.0, z_loss, normaliser
    )
    return grad.to(logits.dtype).contiguous()


def linear_loss_backward(
    row_weight,
    rows,
    weight,
    targets,
    lse,
    bias,
    first_class,
    classes,
    label_smoothing,
    softcap,
    logit_scale,
    z_loss,
    wanted,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.where(row_weight[:, None] == 0, 0.0, rows)  # 0 * NaN would be NaN in the gradient of weight
    z = linear_logits(rows, weight, bias, softcap, logit_scale)
    grad = logits_gradient(
        row_weight, z, targets, lse, first_class, classes, label_smoothing, softcap, logit_scale, z_loss
    )
    nothing = weight.new_empty(0)
    return (
        _product(grad, weight.to(grad.dtype)) if wanted[0] else grad.new_empty(0),
        _product(grad.T, rows.to(grad.dtype)).to(weight.dtype) if wanted[1] else nothing,
        grad.sum(0).to(weight.dtype) if wanted[2] else nothing,
    )


def select_mask(scores: Tensor, gamma: float) -> Tensor:
    finite = scores.isfinite()
    n = finite.sum(1)
    count = torch.minimum((gamma * n.to(torch.float64) + 0.5).floor().to(torch.int64).clamp(min=1), n)
    order = torch.sort(torch.where(finite, scores, -math.inf), dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device)
    return torch.zeros_like(finite).scatter(1, order, places < count[:, None])


def bank_select(
    features: Tensor, rows: Tensor, theta: Tensor, norm: float, k: int, largest: bool
) -> tuple[Tensor, Tensor]:
    # theta . c_i, c_i = [x_i; norm]
    inside = (rows >= 0) & (rows < features.shape[0])
    if rows.device.type == "cpu" and not torch.compiler.is_compiling() and not inside.all():
        place = int((~inside).to(torch.int8).argmax())
        raise IndexError(f"row {int(rows[place])} at place {place} of the bank is outside [0, {features.shape[0]})")
    # a sum a row, not a matrix product, whose order of summation differs from row to row: equal rows tie exactly
    x = features[rows.where(inside, 0)].to(theta.dtype).contiguous()
    predictions = (x * theta[:-1]).sum(1) + norm * theta[-1]
    predictions = predictions.where(inside, math.nan)
    return rows[select_topk(predictions, k, largest, "index")], predictions


def linear_grad_sq_norms(activations: Tensor, grads: Tensor, weight: bool, bias: bool, form: str) -> Tensor:
    a, g = activations.to(compute_dtype(grads.dtype)), grads.to(compute_dtype(grads.dtype))
    total = g.new_zeros(g.shape[0])
    if weight:
        total += (g.mT @ a).square().sum((1, 2))
    if bias:
        total += g.sum(1).square().sum(1)
    return total


def linear_grads_and_sq_norms(activations: Tensor, grads: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    a, g = activations.to(compute_dtype(grads.dtype)), grads.to(compute_dtype(grads.dtype))
    weight_grad = g.flatten(0, 1).mT @ a.flatten(0, 1)
    bias_grad = g.sum((0, 1)) if bias else g.new_zeros(0)
    sq_norms = linear_grad_sq_norms(activations, grads, True, bias, "direct")
    return sq_norms, weight_grad.to(grads.dtype), bias_grad.to(grads.dtype)


_CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def conv_grad_sq_norms(
    input: Tensor, grads: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, weight: bool, bias: bool, form: str,
) -> Tensor:  # fmt: skip
    """By autograd, one sample at a time."""
    x, g = input.to(compute_dtype(grads.dtype)), grads.to(compute_dtype(grads.dtype))
    total = g.new_zeros(g.shape[0])
    shape = (g.shape[1], x.shape[1] // groups, *kernel_size)
    for i in range(g.shape[0]) if weight and g.numel() else ():
        with torch.enable_grad():
            w = x.new_zeros(shape, requires_grad=True)
            out = _CONV[len(kernel_size)](
                x[i : i + 1].detach(), w, None, list(stride), list(padding), list(dilation), groups
            )
            (found,) = torch.autograd.grad(out, w, g[i : i + 1])
        total[i] = found.square().sum()
    if bias:
        total += g.flatten(2).sum(2).square().sum(1)
    return total


def embedding_grad_sq_norms(ids: Tensor, grads: Tensor, padding_idx: int) -> Tensor:
    g = grads.to(compute_dtype(grads.dtype)) * (ids != padding_idx)[:, :, None]
    same = (ids[:, :, None] == ids[:, None, :]).to(g.dtype)
    return ((same @ g) * g).sum((1, 2))  # sum_v |sum_{t: id_t = v} g_t|^2 = sum_{t, s: id_t = id_s} <g_t, g_s>


def affine_grad_sq_norms(
    values: Tensor, grads: Tensor, mean: Tensor | None, rstd: Tensor | None, weight: bool, bias: bool
) -> Tensor:
    x, g = values.to(compute_dtype(grads.dtype)), grads.to(compute_dtype(grads.dtype))
    if mean is not None:
        x = x - mean
    if rstd is not None:
        x = x * rstd
    total = g.new_zeros(g.shape[0])
    if weight:
        total += (g * x).sum(1).square().sum(1)
    if bias:
        total += g.sum(1).square().sum(1)
    return total
