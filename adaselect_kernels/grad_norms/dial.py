"""How exact a gradient norm a selection needs: from the logits alone to every parameter, and a report of what each gives."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

from adaselect_kernels.functional import SampleStats, per_sample_stats
from adaselect_kernels.grad_norms.context import PerSampleGradNorm
from adaselect_kernels.options import GRAD_NORM_SOURCES, require_choice

Forward = Callable[[nn.Module, Any], Any]  # (model, batch) -> (logits, targets), or losses [N]

_NORM_LAYERS = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)


def sample_grad_norms(
    model: nn.Module,
    batch: Any,
    *,
    method: str = "exact",
    forward: Forward | None = None,
    layers: int = 2,
    probes: int = 8,
    seed: int = 0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> SampleStats:
    """Loss and gradient norm of every sample of a batch; no .grad is touched.

    | method | gradient with respect to | cost above the forward |
    |---|---|---|
    | logits | the logits: norm(softmax(z) - onehot(y)) (Katharopoulos & Fleuret 2018, EL2N) | none |
    | last_layer | the last nn.Linear | its backward |
    | last_k | the last `layers` of nn.Linear | their backward |
    | norm_layers | the normalisation layers' weights and biases | a backward without weight gradients |
    | hutchinson | everything, estimated: sqrt(mean_j (g_i . v_j)^2) over `probes` random signs v_j, by forward-mode differentiation | `probes` forwards; relative standard error of the square at most sqrt(2 / probes) |
    | exact | every trainable parameter | a backward without weight gradients, and the norms |

    forward: (model, batch) -> (logits [N, C] or [N, T, C], targets), whose loss is the cross-entropy, of [N, T, C] the mean
        over a sample's positions that are not ignored; or losses [N], which "logits" cannot use. None: the batch is a
        pair (inputs, targets). layers: of "last_k". probes, seed: of "hutchinson".

    Returns SampleStats with `loss` and `grad_norm`, [N], as `SelectedBatches` and `select_from_losses` take them.
    Raises ValueError (unknown method; a model without such layers; what PerSampleGradNorm refuses), TypeError (forward's
    result), NotImplementedError (an operation without forward-mode differentiation, "hutchinson").

    >>> model = nn.Linear(2, 3)
    >>> stats = sample_grad_norms(model, (torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])), method="last_layer")
    >>> stats.grad_norm.shape
    torch.Size([5])
    """  # noqa: E501
    require_choice("method", method, GRAD_NORM_SOURCES)
    check_dial(layers, probes)
    forward = _pair if forward is None else forward
    settings = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if method == "logits":
        result = forward(model, batch)
        if not isinstance(result, (tuple, list)):
            raise ValueError("method 'logits' needs logits and targets, and forward gave losses")
        return per_sample_stats(*result, stats=("loss", "grad_norm"), **settings)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return _losses(forward(model, batch), **settings)

    if method == "hutchinson":
        return _hutchinson(model, batch, losses, probes, seed)
    chosen = _parameters(model, method, layers)
    with torch.enable_grad(), PerSampleGradNorm(model, parameters=chosen, weight_gradients="none") as norms:
        found = losses(model, batch)
        found.sum().backward()
    return SampleStats(loss=found.detach(), grad_norm=norms.total())


def check_dial(layers: int, probes: int) -> None:
    for name, value in (("layers", layers), ("probes", probes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _pair(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"without `forward` a batch must be a pair (inputs, targets), got {type(batch).__name__}")
    return model(batch[0]), batch[1]


def _losses(result: Any, ignore_index: int, label_smoothing: float) -> Tensor:
    """[N] losses that can be differentiated."""
    if isinstance(result, Tensor):
        if result.dim() != 1:
            raise TypeError(f"forward must give losses [N] or (logits, targets), got shape {list(result.shape)}")
        return result
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(f"forward must give losses [N] or (logits, targets), got {type(result).__name__}")
    logits, targets = result
    classes = logits.movedim(-1, 1)
    each = F.cross_entropy(
        classes, targets, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    if each.dim() == 1:
        return each
    return each.sum(1) / (targets != ignore_index).sum(1).clamp(min=1)


def _parameters(model: nn.Module, method: str, layers: int) -> Sequence[nn.Module] | None:
    if method == "exact":
        return None
    kind = _NORM_LAYERS if method == "norm_layers" else nn.Linear
    found = [m for m in model.modules() if isinstance(m, kind) and any(p.requires_grad for p in m.parameters())]
    if not found:
        raise ValueError(
            f"method {method!r} needs a trainable {'normalisation layer' if kind is _NORM_LAYERS else 'nn.Linear'}"
        )
    if method == "norm_layers":
        return found
    return found[-(1 if method == "last_layer" else layers) :]


class _Caller(nn.Module):
    def __init__(self, model: nn.Module, losses: Forward) -> None:
        super().__init__()
        self.model, self._losses = model, losses

    def forward(self, batch: Any) -> Tensor:
        return self._losses(self.model, batch)


def _hutchinson(model: nn.Module, batch: Any, losses: Forward, probes: int, seed: int) -> SampleStats:
    """E (g_i . v)^2 = |g_i|^2 for independent random signs v; g_i . v is the directional derivative of l_i."""
    caller = _Caller(model, losses)
    parameters = {name: p for name, p in caller.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameter")
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    squares, found = 0.0, None
    with torch.no_grad():
        for _ in range(probes):
            with forward_ad.dual_level():
                duals = {
                    name: forward_ad.make_dual(
                        p.detach(), torch.randint(2, p.shape, generator=generator, device=device).to(p.dtype) * 2 - 1
                    )
                    for name, p in parameters.items()
                }
                found, tangent = forward_ad.unpack_dual(torch.func.functional_call(caller, duals, (batch,)))
                if tangent is None:
                    raise ValueError("the losses do not depend on the model's parameters")
                squares = squares + tangent.to(torch.float64).square()
    assert found is not None
    assert isinstance(squares, Tensor)
    norms = (squares / probes).sqrt()
    return SampleStats(loss=found, grad_norm=norms.to(torch.float64 if found.dtype == torch.float64 else torch.float32))


# ---- the report


@dataclass(frozen=True)
class MethodReport:
    """One method beside the exact norms n_i, with scores s_i.

    rank_correlation: Spearman's, of s and n. variance_gain: how many times smaller the second moment of the importance-
    sampled gradient is than that of uniform sampling, N sum n^2 / (sum s sum n^2 / s); `best` is that of s = n.
    overlap: share of the k samples with the largest n that the k largest s hold, k = floor(0.3 N + 0.5).
    """

    method: str
    seconds: float
    rank_correlation: float
    variance_gain: float
    overlap: float


@dataclass(frozen=True)
class DialReport:
    """What each method of `sample_grad_norms` gives on a user's model and batches; `scores` are kept for the figure."""

    rows: tuple[MethodReport, ...]
    best: float
    scores: dict[str, Tensor]

    def table(self) -> str:
        """A Markdown table."""
        lines = [
            "| method | milliseconds | rank correlation | variance gain | of the largest 30 % found |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.method} | {1e3 * r.seconds:.1f} | {r.rank_correlation:.3f} | {r.variance_gain:.2f} | {100 * r.overlap:.0f} % |"
            for r in self.rows
        ]
        return "\n".join(lines) + "\n"

    def figure(self, path: str | Path, title: str = "Gradient norms: what each method gives") -> None:
        """Scores over the exact norms, a panel a method (needs matplotlib)."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        shown = [row for row in self.rows if row.method != "exact"]
        figure, panels = plt.subplots(
            1, len(shown), figsize=(2.9 * len(shown), 3.4), sharex=True, squeeze=False, layout="constrained"
        )
        exact = self.scores["exact"]
        for axes, row in zip(panels[0], shown, strict=True):
            axes.scatter(exact, self.scores[row.method], s=6, alpha=0.5, color="#0b6e4f", linewidths=0)
            axes.set_title(
                f"{row.method}\nrank correlation {row.rank_correlation:.3f}\n{1e3 * row.seconds:.0f} ms", fontsize=9
            )
            axes.set_xlabel("exact norm", fontsize=8)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.tick_params(labelsize=7)
        panels[0][0].set_ylabel("score", fontsize=8)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=140, metadata={"Software": None})
        plt.close(figure)


def dial_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    methods: Sequence[str] = GRAD_NORM_SOURCES,
    forward: Forward | None = None,
    layers: int = 2,
    probes: int = 8,
    seed: int = 0,
) -> DialReport:
    """Compare `methods` with the exact norms on the user's model and batches (an iterable of batches).

    A method that the model has no layers for is left out. Time: wall clock of each method over all batches, the first
    batch once before for warm-up. Raises ValueError without batches, and what `sample_grad_norms` raises for "exact".
    """
    batches = list(batches)
    if not batches:
        raise ValueError("dial_report needs at least one batch, got none")
    for method in methods:
        require_choice("methods", method, GRAD_NORM_SOURCES)
    scores, seconds = {}, {}
    settings = {"forward": forward, "layers": layers, "probes": probes, "seed": seed}
    for method in dict.fromkeys(("exact", *methods)):
        if method in ("last_layer", "last_k", "norm_layers"):
            try:
                _parameters(model, method, layers)
            except ValueError:
                continue
        sample_grad_norms(model, batches[0], method=method, **settings)
        begin = time.perf_counter()
        found = [sample_grad_norms(model, batch, method=method, **settings).grad_norm for batch in batches]
        scores[method] = torch.cat([part.double().cpu() for part in found if part is not None])
        seconds[method] = time.perf_counter() - begin
    exact = scores["exact"]
    rows = tuple(
        MethodReport(method, seconds[method], _rank_correlation(s, exact), _variance_gain(s, exact), _overlap(s, exact))
        for method, s in scores.items()
    )
    return DialReport(rows, _variance_gain(exact, exact), scores)


def _ranks(values: Tensor) -> Tensor:
    """Average ranks."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    return (sizes.cumsum(0) - (sizes - 1) / 2)[group].double()


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _variance_gain(scores: Tensor, norms: Tensor) -> float:
    squares = norms.square()
    drawn = torch.where(squares > 0, squares / scores, 0.0)  # a score of 0 never draws the sample: infinite
    return float(len(norms) * squares.sum() / (scores.sum() * drawn.sum()))


def _overlap(scores: Tensor, norms: Tensor) -> float:
    k = max(1, int(0.3 * len(norms) + 0.5))
    mine, right = scores.topk(k).indices, norms.topk(k).indices
    return float(torch.isin(mine, right).double().mean())
