"""Distances to the decision boundary against a brute force over all classes in NumPy float64."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from adaselect_kernels import boundary
from adaselect_kernels.boundary import boundary_distances, last_linear, logit_margins, pairwise_weight_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def brute_force(logits, weight, targets=None):
    out = []
    for i, z in enumerate(logits):
        c = int(np.argmax(z)) if targets is None else int(targets[i])
        best = math.inf
        for j in range(len(z)):
            norm = math.sqrt(math.fsum((weight[c] - weight[j]) ** 2))
            if j != c and norm > 0:
                best = min(best, (z[c] - z[j]) / norm)
        out.append(best)
    return np.array(out)


@pytest.mark.parametrize("chunk", [None, 1, 5, 23, 100])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_distances_equal_brute_force(dtype, labelled, chunk, generator):
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    weight[6] = weight[2]  # no boundary between these two
    if dtype != torch.float64:
        weight = weight.float()
    features = torch.randn(23, 4, generator=generator, dtype=torch.float64)
    logits = (3 * features @ weight.double().T + 0.1).to(dtype)
    logits[3] = 0.5  # all tied
    logits[4, 2] = logits[4, 6] = 50.0
    targets = torch.randint(9, (23,), generator=generator) if labelled else None
    got = boundary_distances(logits, pairwise_weight_norms(weight), targets, chunk=chunk)
    exact = logits.double().numpy()
    expected = brute_force(exact, weight.double().numpy(), None if targets is None else targets.numpy())
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # float32: the difference of two logits, the norm and the quotient round once each
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-13 if dtype == torch.float64 else 4e-7, atol=0)
    assert (got < 0).any() == labelled
    assert got[3] == 0


def test_classes_with_equal_weights_are_skipped():
    weight = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    logits = torch.tensor([[3.0, 1.0]])
    assert boundary_distances(logits, pairwise_weight_norms(weight)).item() == math.inf
    assert boundary_distances(logits[:, :1], torch.zeros(1, 1)).item() == math.inf
    with_third = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 4.0]])
    logits = torch.tensor([[3.0, 2.9, 1.0]])
    assert boundary_distances(logits, pairwise_weight_norms(with_third)).item() == 1.0


def test_norms_do_not_cancel(generator):
    weight = torch.randn(6, 300, generator=generator) + 1000  # far from the origin
    weight[1] = weight[0]
    weight[1, 7] = torch.nextafter(weight[0, 7], torch.tensor(math.inf))  # one unit in the last place
    weight[5] = weight[4]
    norms = pairwise_weight_norms(weight)
    exact = weight.double().numpy()
    expected = np.sqrt(((exact[:, None] - exact[None]) ** 2).sum(-1))
    np.testing.assert_allclose(norms.numpy(), expected, rtol=1e-7)
    assert norms[0, 1] > 0
    assert norms[4, 5] == 0
    assert torch.equal(norms, norms.T)
    assert pairwise_weight_norms(weight.double()).dtype == torch.float64
    assert not pairwise_weight_norms(nn.Parameter(weight)).requires_grad


@pytest.mark.parametrize("labelled", [False, True])
def test_the_fallback_says_so(labelled, generator):
    logits = torch.randn(20, 7, generator=generator)
    targets = torch.randint(7, (20,), generator=generator) if labelled else None
    with pytest.warns(UserWarning, match="distance to the boundary is not known") as caught:
        got = boundary_distances(logits, None, targets)
    assert [warning.filename for warning in caught] == [__file__]
    z = logits.numpy()
    if labelled:
        own = z[np.arange(20), targets.numpy()]
        z = z.copy()
        z[np.arange(20), targets.numpy()] = -np.inf
        expected = own - z.max(1)
    else:
        ordered = np.sort(z, 1)
        expected = ordered[:, -1] - ordered[:, -2]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logit_margins(logits, targets), got)


def test_more_classes_than_a_matrix_is_for(monkeypatch):
    with pytest.raises(ValueError, match="at most 4096 classes, got 4097"):
        pairwise_weight_norms(torch.zeros(4097, 1))
    monkeypatch.setattr(boundary, "MAX_CLASSES", 5)
    assert pairwise_weight_norms(torch.zeros(5, 1)).shape == (5, 5)


def test_nan_stays_nan():
    norms = pairwise_weight_norms(torch.eye(3))
    got = boundary_distances(torch.tensor([[1.0, math.nan, 0.0], [1.0, 0.0, 0.0], [1.0, -math.inf, 0.0]]), norms)
    assert got[0].isnan()
    torch.testing.assert_close(got[1:], torch.full((2,), 2**-0.5))


def test_inputs_are_not_touched_and_nothing_is_differentiated(generator):
    logits = torch.randn(5, 3, generator=generator, requires_grad=True)
    before = logits.detach().clone()
    got = boundary_distances(logits, pairwise_weight_norms(torch.eye(3)))
    assert not got.requires_grad
    assert torch.equal(logits, before)
    permuted = torch.randn(3, 5, generator=generator).T
    norms = pairwise_weight_norms(torch.randn(2, 3, generator=generator).T)
    assert torch.equal(boundary_distances(permuted, norms), boundary_distances(permuted.contiguous(), norms))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"logits": torch.zeros(3, dtype=torch.int64)},
            TypeError,
            "logits must be a tensor of floats, got torch.int64",
        ),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, "two-dimensional"),
        ({"logits": torch.zeros(0, 4)}, ValueError, r"not empty, got \(0, 4\)"),
        ({"pairwise": torch.zeros(3, 3)}, ValueError, r"pairwise must be \[C, C\] = \[4, 4\] on cpu, got \(3, 3\)"),
        ({"pairwise": "W"}, ValueError, "pairwise must be"),
        ({"targets": torch.zeros(2)}, TypeError, "targets must be int64 or int32, got torch.float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets must be \[2\]"),
        ({"targets": torch.tensor([0, 4])}, IndexError, r"targets must be in \[0, 4\), got 4 in row 1"),
        ({"targets": torch.tensor([-1, 0])}, IndexError, "got -1 in row 0"),
        ({"chunk": 0}, ValueError, "chunk must be"),
    ],
)
def test_wrong_inputs_are_refused(changes, error, message):
    settings = {"logits": torch.zeros(2, 4), "pairwise": torch.zeros(4, 4)} | changes
    with pytest.raises(error, match=message):
        boundary_distances(**settings)


def test_the_last_linear_layer_is_found_or_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 4), nn.Dropout()), nn.ReLU())
    assert last_linear(model) is model[2][0]
    assert last_linear(model[0]) is model[0]
    with pytest.raises(ValueError, match=r"must end in an nn.Linear, got LayerNorm \(1\); pass weight="):
        last_linear(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    with pytest.raises(ValueError, match=r"got Conv2d \(the model itself\); .*distance='top2_margin'"):
        last_linear(nn.Conv2d(2, 3, 1))
    with pytest.raises(ValueError, match="got no parameters"):
        last_linear(nn.ReLU())
