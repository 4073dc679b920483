"""Slim layers against sliced functional calls and NumPy, the converter, and the joint backward of all widths."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaselect_kernels.models import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    joint_backward,
    make_slimmable,
    slim_cost,
    slim_flops_ratio,
    use_width,
    widths_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def randomise(model, generator):
    """Every parameter and statistic, so that nothing is zero or one by accident."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1)
            if tensor.ndim > 1:
                tensor.data.sub_(0.6)
    return model


def check_against(layer, width, x, function, generator):
    """Output and all gradients of `layer` at `width` are those of `function` over the layer's parameters."""
    results = []
    upstream = None
    for run in (layer, function):
        layer.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        if run is layer:
            with use_width(layer, width):
                out = layer(leaf)
        else:
            out = function(leaf)
        upstream = randn(generator, *out.shape) if upstream is None else upstream
        out.backward(upstream)
        results.append((out, leaf.grad, *(p.grad.clone() for p in layer.parameters())))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    return results[0]


@pytest.mark.parametrize(("slim_in", "slim_out"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_its_first_weights(slim_in, slim_out, bias, generator):
    layer = SlimmableLinear(12, 10, bias, widths=(1.0, 0.5, 0.25), slim_in=slim_in, slim_out=slim_out).double()
    for width, i, o in ((1.0, 12, 10), (0.5, 6, 5), (0.25, 3, 3)):  # floor(0.25 * 10 + 0.5) = 3
        i, o = (i if slim_in else 12), (o if slim_out else 10)
        x = randn(generator, 7, i)
        _, _, gradient, *_ = check_against(
            layer, width, x, lambda z, i=i, o=o: z @ layer.weight[:o, :i].T + (layer.bias[:o] if bias else 0), generator
        )
        assert (gradient[:o, :i] != 0).all()
        assert not gradient[o:].any()
        assert not gradient[:, i:].any()


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2), "bias": False},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},  # uneven ways of padding
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
        {"kernel_size": 1, "slim_in": False},
        {"kernel_size": 1, "slim_out": False},
    ],
)
def test_convolution_is_its_first_filters(settings, generator):
    layer = SlimmableConv2d(8, 12, widths=(1.0, 0.25), **settings).double()
    i = 2 if settings.get("slim_in", True) else 8
    o = 3 if settings.get("slim_out", True) else 12
    plain = {name: value for name, value in settings.items() if not name.startswith("slim")}

    def function(x):
        slim = nn.Conv2d(i, o, **plain).double()
        parameters = {name: p[:o, :i] if name == "weight" else p[:o] for name, p in layer.named_parameters()}
        return torch.func.functional_call(slim, parameters, x)

    check_against(layer, 0.25, randn(generator, 2, i, 6, 7), function, generator)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 8, 8), (8, 16, 8), (8, 24, 4), (8, 4, 4)])
def test_slim_groups_are_the_first_groups(inputs, outputs, groups, generator):
    layer = SlimmableConv2d(inputs, outputs, 3, padding=1, groups=groups, widths=(1.0, 0.5)).double()
    x = randn(generator, 2, inputs // 2, 5, 5)

    def function(z):
        padded = torch.cat([z, torch.zeros_like(z)], 1)  # the other groups see nothing and are dropped
        return F.conv2d(padded, layer.weight, layer.bias, padding=1, groups=groups)[:, : outputs // 2]

    check_against(layer, 0.5, x, function, generator)


def test_groups_that_are_not_exact_are_refused():
    message = r"Conv2d\(6, 6, groups=2\): width 0.25 gives 2 inputs and 2 outputs, not whole groups of 3 and 3"
    with pytest.raises(ValueError, match=message):
        SlimmableConv2d(6, 6, 3, groups=2, widths=(1.0, 0.25))
    with pytest.raises(ValueError, match=r"width 0.5 gives 2 inputs and 3 outputs"):  # 2 of 3 groups have 4 outputs
        SlimmableConv2d(3, 6, 3, groups=3, widths=(1.0, 0.5))
    for keep in ({"slim_in": False}, {"slim_out": False}):
        with pytest.raises(ValueError, match="keeps all its inputs or outputs"):
            SlimmableConv2d(8, 8, 3, groups=8, **keep)


def test_one_batchnorm_for_each_width(generator):
    layer = randomise(SlimmableBatchNorm2d(8, widths=(1.0, 0.5, 0.25)).double(), generator)
    plain = {1.0: nn.BatchNorm2d(8).double(), 0.5: nn.BatchNorm2d(4).double(), 0.25: nn.BatchNorm2d(2).double()}
    own = layer.state_dict()
    plain[1.0].load_state_dict({key: value for key, value in own.items() if not key.startswith("slim.")})
    for i, width in enumerate((0.5, 0.25)):
        part = f"slim.{i}."
        plain[width].load_state_dict({k.removeprefix(part): v for k, v in own.items() if k.startswith(part)})
    for width in (0.5, 1.0, 0.25, 0.5):
        x = randn(generator, 4, int(8 * width), 3, 3)
        with use_width(layer, width):
            assert torch.equal(layer(x), plain[width](x))
    assert [layer.num_batches_tracked.item()] + [bn.num_batches_tracked.item() for bn in layer.slim] == [1, 2, 1]
    assert torch.equal(layer.slim[0].running_var, plain[0.5].running_var)
    whole = SlimmableBatchNorm2d(8, widths=(1.0, 0.5), slim_features=False)
    assert whole.slim[0].num_features == 8


def test_the_width_is_restored_after_an_exception():
    model = nn.Sequential(SlimmableLinear(4, 4), SlimmableLinear(4, 4))

    def fail():
        with use_width(model, 0.25):
            with use_width(model, 1.0):
                assert [layer.width for layer in model] == [1.0, 1.0]
            assert [layer.width for layer in model] == [0.25, 0.25]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [layer.width for layer in model] == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"width must be one of \(1.0, 0.25\), got 0.5"), use_width(model, 0.5):
        pass
    with pytest.raises(ValueError, match="Linear has no slimmable layer"), use_width(nn.Linear(2, 2), 1.0):
        pass
    with pytest.raises(ValueError, match="different widths"):
        widths_of(nn.Sequential(SlimmableLinear(4, 4), SlimmableLinear(4, 4, widths=(1.0, 0.5))))


@pytest.mark.parametrize(
    "widths", [(1.0,), (0.5, 1.0), (1.0, 1.0), (1.0, 0.0), (0.5, 0.25), (1.0, 0.25, 0.5), (1.0, float("nan"))]
)
def test_widths_that_are_none_are_refused(widths):
    with pytest.raises(ValueError, match=r"widths must be 1.0 and then smaller ones"):
        SlimmableLinear(16, 16, widths=widths)


def test_a_width_with_zero_channels_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Linear\(8, 16\): width 0.05 gives zero of 8 channels"):
        SlimmableLinear(8, 16, widths=(1.0, 0.05))
    with pytest.raises(ValueError, match=r"Conv2d\(16, 8\): width 0.05 gives zero of 8 channels"):
        SlimmableConv2d(16, 8, 3, widths=(1.0, 0.05))
    with pytest.raises(ValueError, match=r"BatchNorm2d\(8\): width 0.05"):
        SlimmableBatchNorm2d(8, widths=(1.0, 0.05))
    with pytest.raises(ValueError, match=r"module 2 of the Sequential: Linear\(40, 4\): width 0.1 gives zero of 4"):
        make_slimmable(nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 4), nn.Linear(4, 2)), (1.0, 0.1))
    with pytest.raises(TypeError, match="widths must be"):
        SlimmableLinear(4, 4, widths=0.5)
    with pytest.raises(TypeError, match="widths must be numbers"):
        SlimmableLinear(4, 4, widths=(1.0, "0.5"))


def cnn():
    """Everything the converter takes, with two positions left when it flattens."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.Sequential(nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2)),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.PReLU(),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(24, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
        nn.LogSoftmax(1),
    )


def test_conversion_keeps_the_full_width_bit_for_bit(generator):
    model = randomise(cnn(), generator).eval()
    model[3].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    made = make_slimmable(model, (1.0, 0.5, 0.25))
    x = torch.randn(4, 3, 8, 8, generator=generator)
    assert torch.equal(made(x), model(x))
    assert widths_of(made) == (1.0, 0.5, 0.25)
    own = made.state_dict()
    assert all(torch.equal(own[name], value) for name, value in before.items())
    assert all(".slim." in name for name in own if name not in before)
    assert not made[3].weight.requires_grad
    assert made[1].weight.requires_grad
    assert not made.training
    assert not any(module.training for module in made.modules())
    made[1].weight.data.zero_()
    assert torch.equal(model[1].weight, before["1.weight"])  # a copy


def numpy_conv(x, weight, bias, stride):
    """Zero padding of one."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))[:, :, ::stride, ::stride]
    out = np.einsum("ncijuv,ocuv->noij", windows, weight)
    return out if bias is None else out + bias[:, None, None]


def numpy_norm(x, weight, bias, mean, variance):
    shape = (-1, 1, 1)
    scaled = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + 1e-5)
    return scaled * weight.reshape(shape) + bias.reshape(shape)


@pytest.mark.parametrize(("width", "c1", "c2", "c3"), [(0.5, 4, 5, 4), (0.25, 2, 3, 2), (1.0, 8, 10, 8)])
def test_a_converted_network_equals_numpy_at_every_width(width, c1, c2, c3, generator):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3, stride=2, padding=1),  # 3 channels at 0.25: 18 features, more than a quarter of 60
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10 * 3 * 2, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )
    made = randomise(make_slimmable(model.double(), (1.0, 0.5, 0.25)), generator).eval()
    x = randn(generator, 3, 3, 6, 4)
    with use_width(made, width), torch.no_grad():
        got = made(x).numpy()
    p = {name: tensor.detach().numpy() for name, tensor in made.state_dict().items()}
    norm = "1." if width == 1.0 else f"1.slim.{(0.5, 0.25).index(width)}."
    h = numpy_conv(x.numpy(), p["0.weight"][:c1], None, 1)
    h = numpy_norm(h, *(p[norm + name] for name in ("weight", "bias", "running_mean", "running_var")))
    h = np.tanh(numpy_conv(np.maximum(h, 0), p["3.weight"][:c2, :c1], p["3.bias"][:c2], 2))
    # the features of the first c2 channels, each with its 3 x 2 positions, of the full layer's [8, 10, 3, 2]
    dense = p["6.weight"].reshape(8, 10, 3, 2)[:c3, :c2]
    h = np.maximum(np.einsum("ncij,ocij->no", h, dense) + p["6.bias"][:c3], 0)
    expected = h @ p["8.weight"][:, :c3].T + p["8.bias"]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_slim_batchnorms_start_as_the_first_channels(generator):
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)), generator)
    made = make_slimmable(model, (1.0, 0.25))
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(made[1].slim[0], name), getattr(model[1], name)[:2])
    bare = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False, track_running_stats=False), nn.Conv2d(8, 2, 1)
    )
    x = torch.randn(3, 3, 2, 2, generator=generator)
    assert torch.equal(make_slimmable(bare)(x), bare(x))


class Twice(nn.ReLU):
    def forward(self, x):
        return torch.cat([x, x], 1)


def shared():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[1].register_forward_hook(lambda module, inputs, output: output)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)), r"module 1 .*GroupNorm"),
        (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)), r"module 1 .*LayerNorm"),
        (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)), r"module 1 .*BatchNorm1d"),
        (nn.Sequential(nn.Linear(8, 8), nn.Softmax(1), nn.Linear(8, 4)), r"module 1 .*Softmax"),
        (nn.Sequential(nn.Linear(8, 8), nn.PReLU(8), nn.Linear(8, 4)), r"module 1 .*PReLU"),
        (nn.Sequential(nn.Linear(8, 8), Twice(), nn.Linear(16, 4)), r"module 1 .*Twice"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.ReLU(), nn.Unflatten(1, (2, 4)))), r"at least|two Conv2d"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(nn.Unfold(2)), nn.Linear(8, 2)), r"module 1\.0 .*Unfold"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.Linear(4, 2)), r"module 1 .*Flatten"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Linear(4, 2)), r"module 2 .*without Flatten"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(30, 2)), r"module 2 .*30 features, no multiple of the 8"),
        (nn.Sequential(nn.Linear(4, 8), nn.Flatten(), nn.Linear(24, 2)), r"module 2 .*takes 24 channels.*gives 8"),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Conv2d(8, 8, 1)), r"module 2 .*Conv2d after Flatten"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4), nn.Conv2d(8, 8, 1)), r"module 1 .*4 channels.*gives 8"),
        (nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 1)), r"module 0 .*keeps all its inputs"),
        (nn.Sequential(nn.Linear(8, 1), nn.Linear(1, 8)), r"module 0 .*gives zero of 1 channels"),
        (nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), r"this model has 1"),
        (shared(), r"module 2 of the Sequential shares what module 0 has"),
        (tied(), r"module 2 of the Sequential shares what module 0 has"),
        (hooked(), r"module 1 of the Sequential has hooks"),
    ],
)  # fmt: skip
def test_what_would_break_is_refused_by_position(model, message):
    with pytest.raises(ValueError, match=message):
        make_slimmable(model, (1.0, 0.25))


def test_only_sequential_networks_are_converted():
    with pytest.raises(TypeError, match=r"takes an nn.Sequential, got Linear"):
        make_slimmable(nn.Linear(2, 2))
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
    made = make_slimmable(depthwise)
    with use_width(made, 0.25):
        assert made(torch.zeros(1, 3, 4, 4)).shape == (1, 2, 2, 2)


def test_the_state_is_plain(generator):
    made = make_slimmable(cnn())
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = make_slimmable(cnn())
    with use_width(made, 0.25):
        keys = list(made.state_dict())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert keys == list(other.state_dict())
    x = torch.randn(2, 3, 8, 8, generator=generator)
    for width in (1.0, 0.25):
        with use_width(made.eval(), width), use_width(other.eval(), width):
            assert torch.equal(made(x), other(x))


def small(generator):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    return randomise(make_slimmable(model, (1.0, 0.25)), generator)


def numpy_gradients(p, x, upstream_of, width):
    """Gradients of the four parameters for the mean loss whose gradient at the logits is upstream_of(z) / N; full shapes."""
    h = 8 if width == 1.0 else 2
    w1, b1, w2, b2 = (p[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    hidden = np.tanh(x @ w1[:h].T + b1[:h])
    z = hidden @ w2[:, :h].T + b2
    g = upstream_of(z) / len(x)
    back = (g @ w2[:, :h]) * (1 - hidden**2)
    gradients = {
        "0.weight": np.zeros_like(w1),
        "0.bias": np.zeros_like(b1),
        "2.weight": np.zeros_like(w2),
        "2.bias": g.sum(0),
    }
    gradients["0.weight"][:h], gradients["0.bias"][:h], gradients["2.weight"][:, :h] = (
        back.T @ x,
        back.sum(0),
        g.T @ hidden,
    )
    return gradients, z


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("scale", [None, 64.0])
def test_joint_backward_is_the_sum_of_both_widths(distill, scale, generator):
    model = small(generator)
    x, y = randn(generator, 6, 3), torch.randint(4, (6,), generator=generator)
    p = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    onehot = np.eye(4)[y.numpy()]
    full, z = numpy_gradients(p, x.numpy(), lambda z: softmax(z) - onehot, 1.0)
    target = softmax(z) if distill else onehot
    slim, z_slim = numpy_gradients(p, x.numpy(), lambda z: softmax(z) - target, 0.25)
    losses = joint_backward(
        model, x, y, F.cross_entropy, distill, scale=None if scale is None else lambda loss: loss * scale
    )
    for name, parameter in model.named_parameters():
        expected = (full[name] + slim[name]) * (scale or 1.0)
        np.testing.assert_allclose(parameter.grad.numpy(), expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(losses[1.0].item(), -(onehot * np.log(softmax(z))).sum(1).mean(), rtol=1e-12)
    np.testing.assert_allclose(losses[0.25].item(), -(target * np.log(softmax(z_slim))).sum(1).mean(), rtol=1e-12)
    assert not any(loss.requires_grad for loss in losses.values())
    joint_backward(model, x, y, F.cross_entropy, distill)  # gradients accumulate
    expected = (full["2.bias"] + slim["2.bias"]) * (1 + (scale or 1.0))
    np.testing.assert_allclose(model[2].bias.grad.numpy(), expected, rtol=1e-11, atol=1e-13)
    assert [layer.width for layer in (model[0], model[2])] == [1.0, 1.0]


@pytest.mark.parametrize("distill", [False, True])
def test_joint_backward_under_autocast(distill, generator):
    model = small(generator).float()
    x, y = torch.randn(6, 3, generator=generator), torch.randint(4, (6,), generator=generator)
    expected = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = joint_backward(model, x, y, F.cross_entropy, distill)
    for width in (1.0, 0.25):
        with use_width(expected, width), torch.autocast("cpu", torch.bfloat16):
            z = expected(x)
            if width == 1.0:
                teacher = z.detach().float().softmax(1)
            loss = F.cross_entropy(z.float(), teacher if distill and width < 1.0 else y)
        loss.backward()
        assert torch.equal(loss.detach(), losses[width])
        assert z.dtype == torch.bfloat16
    for got, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got.grad, wanted.grad)


def test_a_compiled_model_has_every_width(generator):
    model = small(generator)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = randn(generator, 6, 3)
    for width in (1.0, 0.25, 1.0):
        with use_width(compiled, width):
            got = compiled(x)
            assert torch.equal(got, model(x))


def test_measuring_leaves_no_trace_and_counts_right():
    model = make_slimmable(cnn(), (1.0, 0.25)).train()
    before, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.zeros(2, 3, 8, 8)
    rho = slim_cost(model, (x, torch.zeros(2)), 0.25, repeats=2)
    assert 0.0 < rho < 10.0
    calls = []
    assert slim_cost(model, {"x": x}, 0.25, lambda m, b: calls.append(m(b["x"])), repeats=1) > 0.0
    assert len(calls) == 4
    ratio = slim_flops_ratio(model, x, 0.25)
    full = 64 * 8 * 3 * 9 + 4 * 12 * 8 * 9 + 24 * 8 + 8 * 5
    slim = 64 * 2 * 3 * 9 + 4 * 3 * 2 * 9 + 6 * 2 + 2 * 5
    assert ratio == pytest.approx(slim / full, rel=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), stream)
    with pytest.raises(ValueError, match="width must be one of"):
        slim_cost(model, x, 0.5)
    with pytest.raises(ValueError, match="repeats must be"):
        slim_cost(model, x, 0.25, repeats=0)
