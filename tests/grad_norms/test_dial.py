"""The dial from logits to exact norms, its report, and the policy over it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaselect_kernels import get_policy, per_sample_stats
from adaselect_kernels.grad_norms import dial_report, sample_grad_norms
from adaselect_kernels.options import GRAD_NORM_SOURCES
from adaselect_kernels.training import SelectedBatches


def network():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten()),
        *(nn.Linear(64, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 5)),
    )


@pytest.fixture
def case(generator):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return network(), (torch.randn(9, 1, 6, 6, generator=generator), torch.randint(5, (9,), generator=generator))


def expected(model, inputs, targets, modules):
    """[N] float64 norms over the modules' parameters, from one backward a sample."""
    double = network().double()
    double.load_state_dict(model.state_dict())
    names = [f"{name}.{p}" for name in modules for p in ("weight", "bias")]
    found = []
    for x, y in zip(inputs.double(), targets, strict=True):
        double.zero_grad()
        F.cross_entropy(double(x[None]), y[None]).backward()
        grads = dict(double.named_parameters())
        found.append(torch.stack([grads[name].grad.square().sum() for name in names]).sum().sqrt())
    return torch.stack(found)


MODULES = {
    "last_layer": ("7",),
    "last_k": ("4", "7"),
    "norm_layers": ("1", "5"),
    "exact": ("0", "1", "4", "5", "7"),
}


@pytest.mark.parametrize("method", MODULES)
def test_norms_are_those_of_the_layers_that_the_method_names(case, method):
    model, (inputs, targets) = case
    got = sample_grad_norms(model, (inputs, targets), method=method)
    torch.testing.assert_close(
        got.grad_norm.double(), expected(model, inputs, targets, MODULES[method]), rtol=2e-6, atol=0
    )
    torch.testing.assert_close(got.loss, F.cross_entropy(model(inputs), targets, reduction="none").detach())
    assert all(p.grad is None for p in model.parameters())


def test_logits_are_the_fused_statistics(case):
    model, (inputs, targets) = case
    got = sample_grad_norms(model, (inputs, targets), method="logits")
    right = per_sample_stats(model(inputs), targets)
    assert torch.equal(got.grad_norm, right.grad_norm)
    assert torch.equal(got.loss, right.loss)


def test_hutchinson_is_unbiased_for_the_square(case):
    model, (inputs, targets) = case
    exact = expected(model, inputs, targets, MODULES["exact"]).square()
    probes = 120
    got = sample_grad_norms(model, (inputs, targets), method="hutchinson", probes=probes, seed=3).grad_norm.double()
    # relative standard error sqrt(2 / probes): five of them for the worst of nine samples
    assert ((got.square() - exact).abs() / exact).max() < 5 * math.sqrt(2 / probes)
    again = sample_grad_norms(model, (inputs, targets), method="hutchinson", probes=3, seed=3).grad_norm
    other = sample_grad_norms(model, (inputs, targets), method="hutchinson", probes=3, seed=4).grad_norm
    same = sample_grad_norms(model, (inputs, targets), method="hutchinson", probes=3, seed=3).grad_norm
    assert torch.equal(again, same)
    assert not torch.equal(again, other)


def test_sequences_have_the_norm_of_their_mean_loss(generator):
    model = nn.Linear(6, 5)
    inputs = torch.randn(4, 7, 6, generator=generator)
    targets = torch.randint(5, (4, 7), generator=generator)
    targets[1, 3:] = -100
    got = sample_grad_norms(model, (inputs, targets))
    for i in range(4):
        model.zero_grad()
        F.cross_entropy(model(inputs[i]), targets[i]).backward()
        right = math.sqrt(float(model.weight.grad.square().sum() + model.bias.grad.square().sum()))
        assert float(got.grad_norm[i]) == pytest.approx(right, rel=1e-5)


def test_losses_of_ones_own(generator):
    model = nn.Linear(3, 1)
    batch = {"x": torch.randn(5, 3, generator=generator), "y": torch.randn(5, generator=generator)}

    def losses(model, batch):
        return (model(batch["x"])[:, 0] - batch["y"]).square()

    got = sample_grad_norms(model, batch, forward=losses)
    residual = 2 * (model(batch["x"])[:, 0] - batch["y"]).detach()
    right = residual.abs() * (batch["x"].square().sum(1) + 1).sqrt()
    torch.testing.assert_close(got.grad_norm, right)
    with pytest.raises(ValueError, match="'logits' needs logits"):
        sample_grad_norms(model, batch, forward=losses, method="logits")


def test_what_does_not_fit_is_refused(case):
    model, batch = case
    with pytest.raises(ValueError, match=r"method must be one of .*exact"):
        sample_grad_norms(model, batch, method="best")
    with pytest.raises(ValueError, match="layers must be an integer of at least 1, got 0"):
        sample_grad_norms(model, batch, method="last_k", layers=0)
    with pytest.raises(ValueError, match="probes must be"):
        sample_grad_norms(model, batch, method="hutchinson", probes=True)
    with pytest.raises(TypeError, match="pair"):
        sample_grad_norms(model, {"x": batch[0]})
    with pytest.raises(ValueError, match="needs a trainable normalisation layer"):
        sample_grad_norms(nn.Linear(2, 2), (torch.randn(3, 2), torch.tensor([0, 1, 0])), method="norm_layers")
    with pytest.raises(TypeError, match=r"losses \[N\]"):
        sample_grad_norms(model, batch, forward=lambda model, batch: model(batch[0]))
    with pytest.raises(ValueError, match="at least one batch"):
        dial_report(model, [])


def test_the_report_measures_each_method_against_the_exact_norms(case, generator, tmp_path):
    model, batch = case
    batches = [batch, (torch.randn(8, 1, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator))]
    report = dial_report(model, batches, probes=2)
    rows = {row.method: row for row in report.rows}
    assert set(rows) == set(GRAD_NORM_SOURCES)
    assert rows["exact"].rank_correlation == pytest.approx(1.0)
    assert rows["exact"].overlap == 1.0
    n = report.scores["exact"]
    assert report.best == pytest.approx(float(17 * n.square().sum() / n.sum() ** 2))
    for method, s in report.scores.items():
        right = float(17 * n.square().sum() / (s.sum() * (n.square() / s).sum()))
        assert rows[method].variance_gain == pytest.approx(right)
        assert right <= report.best * (1 + 1e-12)  # Cauchy-Schwarz
        order = torch.corrcoef(torch.stack([s.argsort().argsort().double(), n.argsort().argsort().double()]))[0, 1]
        assert rows[method].rank_correlation == pytest.approx(float(order))
        assert f"| {method} |" in report.table()
    report.figure(tmp_path / "dial.png")
    assert (tmp_path / "dial.png").stat().st_size > 10_000


def test_a_report_leaves_out_what_the_model_has_no_layers_for():
    report = dial_report(nn.Linear(2, 3), [(torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))])
    assert "norm_layers" not in report.scores
    assert "last_layer" in report.scores


@pytest.mark.parametrize("source", GRAD_NORM_SOURCES)
def test_the_policy_chooses_by_its_source(case, source):
    model, batch = case
    policy = get_policy("grad_norm", 0.5, source=source, seed=7, probes=2)
    norms = sample_grad_norms(model, batch, method=source, probes=2, seed=7).grad_norm
    batches = SelectedBatches([batch], model, policy, batch_size=5)
    (chosen,) = list(batches)
    k = 5
    assert torch.equal(batches.last.indices, norms.topk(k).indices.sort().values)
    assert torch.equal(chosen[1], batch[1][batches.last.indices])
    assert all(p.grad is None for p in model.parameters())
    if source != "logits":
        with pytest.raises(ValueError, match=f"source='{source}' needs the model"):
            policy.select(model(batch[0]), batch[1])


def test_the_source_is_part_of_the_saved_settings():
    saved = get_policy("grad_norm", 0.5, source="exact").state_dict()
    get_policy("grad_norm", 0.5, source="exact").load_state_dict(saved)
    with pytest.raises(ValueError, match="settings"):
        get_policy("grad_norm", 0.5).load_state_dict(saved)
    with pytest.raises(ValueError, match="source must be one of"):
        get_policy("grad_norm", 0.5, source="everything")
    with pytest.raises(TypeError, match="no setting 'source'"):
        get_policy("big_loss", 0.5, source="exact")
