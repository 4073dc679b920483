"""Random banks, and what bank_select must make of them: shared by the tests of its implementations."""

import numpy as np
import torch

from adaselect_kernels.functional import bank_select

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8]
LAYOUTS = ("contiguous", "transposed", "padded")


def draw(generator, total, columns, n, dtype, layout="contiguous"):
    if dtype == torch.uint8:
        features = torch.randint(0, 256, (total, columns), generator=generator, dtype=dtype)
    else:
        features = torch.randn(total, columns, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "transposed":
        features = features.t().contiguous().t()
    elif layout == "padded":
        features = torch.cat([features, features], 1)[:, :columns]
    rows = torch.randint(total, (2 * n,), generator=generator)[::2]  # with repeats, strided
    theta = torch.randn(
        columns + 1, generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    return features, rows, theta


def check(features, rows, theta, norm, k, largest, impl):
    picked, predictions = bank_select(features, rows, theta, k, norm=norm, largest=largest, impl=impl)
    assert predictions.dtype == theta.dtype
    x, t = features.double().numpy()[rows.numpy()], theta.double().numpy()
    expected = x @ t[:-1] + norm * t[-1]
    # a sum of D terms in the dtype of theta, however it is ordered
    unit = torch.finfo(theta.dtype).eps / 2
    bound = (features.shape[1] + 2) * unit * (np.abs(x) @ np.abs(t[:-1]) + abs(norm * t[-1])) + 1e-300
    assert np.all(np.abs(predictions.double().numpy() - expected) <= bound)
    scores = predictions.double().numpy() if largest else -predictions.double().numpy()
    places = np.sort(np.argsort(-scores, kind="stable")[:k])
    assert picked.tolist() == rows.numpy()[places].tolist()


def check_ties(impl, generator):
    """Ties go to the earlier place, NaN comes last."""
    features = torch.randn(7, 37, generator=generator)
    rows = torch.tensor([5, 2, 6, 2, 0, 5, 3])
    assert bank_select(features, rows, torch.zeros(38), 3, norm=9.0, impl=impl)[0].tolist() == [5, 2, 6]
    features[:] = features[0].clone()
    features[6] = float("nan")
    theta = torch.randn(38, generator=generator)
    for largest in (False, True):
        picked, predictions = bank_select(features, rows, theta, 4, largest=largest, impl=impl)
        assert len(set(predictions[rows != 6].tolist())) == 1, "identical rows, wherever they stand"
        assert picked.tolist() == [5, 2, 2, 0]
    assert bank_select(features, rows, theta, 7, impl=impl)[0].tolist() == [5, 2, 6, 2, 0, 5, 3]
