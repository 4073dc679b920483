"""The ResNet-18 for small images, and its slimmable form: at a quarter of the width it is the network of that width."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaselect_kernels.models import resnet18, slimmable_resnet18, use_width

pytestmark = pytest.mark.usefixtures("one_thread")


def randomise(model, generator):
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(noise + 0.5 if tensor.ndim == 1 else (noise - 0.5) / tensor[0].numel() ** 0.5)
    return model


def test_it_is_the_usual_network():
    with torch.device("meta"):
        model = resnet18()
        shape = model(torch.zeros(2, 3, 32, 32)).shape
    assert sum(p.numel() for p in model.parameters()) == 11_173_962  # the published count for CIFAR-10
    assert shape == (2, 10)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size[0], c.stride[0]) for c in convolutions].count((1, 2)) == 3
    assert len(convolutions) == 20
    assert convolutions[0].stride == (1, 1)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_forward_equals_functional_calls(norm, generator):
    model = randomise(resnet18(classes=5, width=12, norm=norm, channels=2).double(), generator).eval()
    x = torch.randn(2, 2, 16, 16, generator=generator, dtype=torch.float64)
    p = model.state_dict()

    def normal(z, name):
        weight, bias = p[name + ".weight"], p[name + ".bias"]
        if norm == "group":
            return F.group_norm(z, {12: 4}.get(z.shape[1], 8), weight, bias)
        return F.batch_norm(z, p[name + ".running_mean"], p[name + ".running_var"], weight, bias)

    h = F.relu(normal(F.conv2d(x, p["conv.weight"], padding=1), "norm"))
    for i in range(8):
        block, stride = f"blocks.{i}.", 2 if i in (2, 4, 6) else 1
        out = F.relu(normal(F.conv2d(h, p[block + "conv1.weight"], stride=stride, padding=1), block + "norm1"))
        out = normal(F.conv2d(out, p[block + "conv2.weight"], padding=1), block + "norm2")
        if stride == 2:
            h = normal(F.conv2d(h, p[block + "skip.0.weight"], stride=2), block + "skip.1")
        h = F.relu(out + h)
    assert h.shape == (2, 96, 2, 2)
    expected = h.mean((2, 3)) @ p["head.weight"].T + p["head.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-12)


def test_group_norm_mixes_no_samples(generator):
    x = torch.randn(3, 3, 8, 8, generator=generator)
    model = resnet18(width=8, norm="group").train()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="norm must be one of 'batch', 'group'; got 'layer'"):
        resnet18(norm="layer")
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        resnet18(width=0)
    with pytest.raises(TypeError, match=r"classes must be an int, got 2\.0"):
        resnet18(classes=2.0)
    with pytest.raises(ValueError, match=r"Conv2d\(3, 4\): width 0.05 gives zero of 4 channels"):
        slimmable_resnet18(width=4, widths=(1.0, 0.05))


def test_the_slim_network_is_the_small_one_with_the_first_weights(generator):
    model = randomise(slimmable_resnet18(7, (1.0, 0.5, 0.25), width=8).double(), generator).eval()
    x = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    own = model.state_dict()
    for i, width in enumerate((1.0, 0.5, 0.25)):
        small = resnet18(7, width=int(8 * width)).double().eval()
        wanted = small.state_dict()
        for name, tensor in wanted.items():
            owner, _, leaf = name.rpartition(".")
            norm = isinstance(model.get_submodule(owner), nn.BatchNorm2d)
            source = own[f"{owner}.slim.{i - 1}.{leaf}" if norm and i else name]
            wanted[name] = source[tuple(slice(n) for n in tensor.shape)]
        small.load_state_dict(wanted)
        with torch.no_grad(), use_width(model, width):
            torch.testing.assert_close(model(x), small(x), rtol=1e-11, atol=1e-12)
    assert model.load_state_dict(resnet18(7, width=8).state_dict(), strict=False).unexpected_keys == []
