"""The scoring pass: everything is as if it had not run, whatever the model does and however the forward ends."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaselect_kernels.training import score, scoring_pass

MODES = ("eval", "train")


pytestmark = pytest.mark.usefixtures("one_thread")


class Noisy(nn.Module):
    """Draws from every global stream, whatever its mode."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=True) + torch.rand(()) + random.random() + float(np.random.rand())  # noqa: NPY002


class Counter(nn.Module):
    """A buffer written in place in both modes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.seen.add_(x.detach().mean())
        return x


class Cache(nn.Module):
    """Buffers that are replaced, made, resized, removed, or absent."""

    def __init__(self):
        super().__init__()
        self.register_buffer("replaced", torch.ones(2))
        self.register_buffer("resized", torch.ones(2))
        self.register_buffer("removed", torch.ones(2))
        self.register_buffer("absent", None)
        self.register_buffer("expanded", torch.ones(1).expand(4))

    def forward(self, x):
        self.replaced = torch.zeros(5)
        self.resized.resize_(7).fill_(3)
        del self.removed
        self.absent = torch.ones(1)
        self.register_buffer("made", x.detach().clone(), persistent=False)
        return x * self.expanded[0]


class Flipper(nn.Module):
    """A forward that changes training flags, as one that freezes a teacher does."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
        self.frozen = nn.Dropout().eval()

    def forward(self, x):
        self.teacher.eval()
        self.train(not self.training)
        return self.teacher(x)


class Frozen(nn.Module):
    """A nested part kept in evaluation mode while the rest trains."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
        self.head = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
        self.backbone.eval()

    def forward(self, x):
        return self.head(self.backbone(x))


class Momentum(nn.BatchNorm1d):
    """A subclass that updates a statistic in evaluation mode too."""

    def forward(self, x):
        self.running_mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return super().forward(x)


class Shared(nn.Module):
    """One buffer in two modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Counter(), Counter()
        self.second.calls = self.first.calls

    def forward(self, x):
        return self.second(self.first(x))


def new_spectral_norm():
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    with torch.no_grad():
        module.parametrizations.weight.original.normal_()  # so that the power iteration still has a way to go
    return module


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        return torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()))


def old_spectral_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in use
        return torch.nn.utils.spectral_norm(module)


MODELS = {
    "batch norm and dropout": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout()),
    "batch norm without momentum": lambda: nn.BatchNorm1d(3, momentum=None),
    "instance norm that tracks": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True, affine=True), nn.Flatten()
    ),
    "two dimensions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 1)), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout2d(), nn.Flatten()
    ),
    "batch norm of float64": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(),
    "frozen part": Frozen,
    "statistics updated in eval": lambda: Momentum(3),
    "spectral norm": new_spectral_norm,
    "old spectral norm": lambda: old_spectral_norm(nn.Linear(3, 4)),
    "random streams": Noisy,
    "counter": Counter,
    "changing set of buffers": Cache,
    "changing flags": Flipper,
    "shared buffer": Shared,
    "rrelu": lambda: nn.RReLU(),
    "scripted": scripted,
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), backend="eager"),
}


def streams():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2:]


def bits(tensor):
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.detach().clone().numpy().tobytes())


def trace(model):
    """Everything a scoring pass must leave alone."""
    return {
        "flags": [module.training for module in model.modules()],
        "buffers": [{name: (id(b), bits(b)) for name, b in module._buffers.items()} for module in model.modules()],
        "parameters": [(id(p), bits(p), id(p.grad), bits(p.grad)) for p in model.parameters()],
        "names": sorted(model.state_dict()),
        "streams": streams(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    }


def inputs_for(model, rows=8):
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return torch.randn(rows, 3, dtype=dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_it_leaves_no_trace(model, mode):
    model = model()
    x = inputs_for(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = trace(model)
    score(model, x, mode=mode)
    assert trace(model) == before


def test_the_models_do_leave_traces():
    """A plain forward without gradients changes each of them in one mode at least, or the test above proves nothing."""
    for name, build in MODELS.items():
        model = build()
        x = inputs_for(model)
        before = trace(model)
        with torch.no_grad():
            model(x)
        assert trace(model) != before, name


class Broken(nn.Module):
    def forward(self, x):
        raise FloatingPointError("on purpose")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_it_leaves_no_trace_when_the_forward_raises(model, mode):
    model = nn.Sequential(model(), Noisy(), Broken())
    x = inputs_for(model)
    before = trace(model)
    with pytest.raises(FloatingPointError):
        score(model, x, mode=mode)
    assert trace(model) == before


def train(model, score_with=None, steps=6):
    """A few updates of momentum SGD, with or without a scoring pass before each."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(16, 3)
        if score_with:
            score(model, x, mode=score_with)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return trace(model)


@pytest.mark.parametrize("mode", MODES)
def test_training_with_scoring_is_training_without(mode):
    torch.manual_seed(0)
    first = nn.Sequential(
        Frozen(), Noisy(), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3), nn.Dropout()
    )
    second = copy.deepcopy(first)
    expected, got = train(first), train(second, mode)
    for key in ("flags", "streams", "names"):
        assert got[key] == expected[key]
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_eval_scores_in_evaluation_mode():
    model = MODELS["batch norm and dropout"]()
    x = inputs_for(model)
    expected = copy.deepcopy(model).eval()(x)
    assert torch.equal(score(model, x), expected)
    model.eval()
    assert torch.equal(score(model, x), expected)


def test_train_scores_as_the_training_step_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    x = torch.randn(8, 3)
    got = score(model, x, mode="train")
    assert torch.equal(got, model(x))  # the same dropout mask: the stream was put back
    assert not torch.equal(got, score(model, x, mode="eval"))


def test_train_keeps_the_flag_of_every_module():
    seen = []
    model = Frozen()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: seen.append((module, module.training)))
    flags = {module: module.training for module in model.modules()}
    score(model, torch.randn(4, 3), mode="train")
    assert seen
    assert all(flags[module] == flag for module, flag in seen)
    seen.clear()
    score(model, torch.randn(4, 3), mode="eval")
    assert not any(flag for _, flag in seen)


def test_overridden_train_is_not_called():
    class Merging(nn.Linear):
        def train(self, mode=True):
            raise AssertionError("merging weights is none of the scoring pass's business")

    score(Merging(3, 3), torch.randn(2, 3))


def test_a_graph_that_waits_for_its_backward_survives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3)
    torch.manual_seed(5)
    twin(x).sum().backward()
    torch.manual_seed(5)
    loss = model(x).sum()
    for mode in MODES:
        score(model, torch.randn(8, 3), mode=mode)
    loss.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_context_comes_back_and_results_are_ordinary(context, mode):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 3)
    before = trace(model)
    with context():
        inside = trace(model)["modes"]
        out = score(model, x, mode=mode)
        assert trace(model)["modes"] == inside
    assert trace(model) == before
    assert not out.requires_grad
    assert not out.is_inference()
    weight = torch.ones(4, requires_grad=True)
    (out * weight).sum().backward()  # an inference tensor could not be saved for this
    assert torch.equal(weight.grad, out.sum(0))


def test_gradients_are_off_inside():
    with scoring_pass(nn.Linear(3, 3)):
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = nn.Linear(3, 4)
    x = torch.randn(8, 3)
    before = trace(model)
    with torch.autocast("cpu", dtype=dtype):
        expected = model(x)
    out = score(model, x, autocast=dtype)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert score(model, x).dtype == torch.float32
    assert trace(model) == before


def test_the_callers_autocast_is_kept():
    model = nn.Linear(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert score(model, torch.randn(2, 3)).dtype == torch.bfloat16
        assert score(model, torch.randn(2, 3), autocast=torch.float16).dtype == torch.float16
        assert model(torch.randn(2, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_scoring_inside_the_callers_autocast_costs_no_gradient(autocast):
    """Autocast caches the cast of a weight; one made without gradients would cut the weight off from the update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3)
    for net, scores in ((model, True), (twin, False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if scores:
                score(net, x, autocast=autocast)
            loss = net(x).float().square().mean()
        loss.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_eval_runs_no_operator_besides_the_forward():
    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).eval()
    x = torch.randn(8, 3)
    with Operators() as plain, torch.no_grad():
        model(x)
    model.train()
    with Operators() as scored:
        score(model, x)
    assert scored.seen == plain.seen


def test_an_update_of_a_parameter_is_loud():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            with torch.no_grad():
                self.teacher.weight.lerp_(self.student.weight, 0.1)
            return self.student(x)

    model = Teacher()
    with pytest.raises(RuntimeError, match=r"wrote in place to teacher\.weight"):
        score(model, torch.randn(2, 3))
    assert model.training


class Queue(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(2**20 + 1))

    def forward(self, x):
        self.queue[0] += 1
        return x


def test_a_large_buffer_is_copied_in_training_mode_and_loud_otherwise():
    model = Queue()
    score(model, torch.randn(2, 3), mode="train")
    assert model.queue[0] == 0
    with pytest.raises(RuntimeError, match="wrote in place to queue"):
        score(model, torch.randn(2, 3), mode="eval")


def test_buffers_made_in_inference_mode_are_no_obstacle():
    model = Counter()
    with torch.inference_mode():
        model.seen = torch.ones(3)
        model.register_buffer("table", torch.ones(2**20 + 1))
    model.forward = lambda x: x + model.seen
    for mode in MODES:
        assert torch.equal(score(model, torch.zeros(3), mode=mode), torch.ones(3))


@pytest.mark.parametrize(
    ("build", "arguments", "error", "match"),
    [
        (lambda: nn.Linear(3, 3), {"mode": "test"}, ValueError, "mode must be one of 'eval', 'train'; got 'test'"),
        (
            lambda: nn.Linear(3, 3),
            {"autocast": torch.float32},
            TypeError,
            "autocast must be None, .* got torch.float32",
        ),
        (lambda: nn.Linear(3, 3), {"autocast": True}, TypeError, "autocast must be None"),
        (lambda: nn.Linear(3, 3).eval(), {"mode": "train"}, ValueError, "call model.train()"),
        (lambda: nn.LazyLinear(3), {}, RuntimeError, "not initialised yet: weight, bias; run one forward"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), {}, RuntimeError, "not initialised yet: 0.weight, 0.bias"),
    ],
)
def test_refusals_change_nothing(build, arguments, error, match):
    model, x = build(), torch.randn(2, 3)
    flags, before = [module.training for module in model.modules()], streams()
    with pytest.raises(error, match=match):
        score(model, x, **arguments)
    assert [module.training for module in model.modules()] == flags
    assert streams() == before


def test_any_call_of_the_model_fits_the_context():
    model = nn.Bilinear(3, 3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(score(model, x, x), model(x, x))
    with scoring_pass(model):
        assert torch.equal(model(input1=x, input2=x), model(x, x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_on_a_gpu_it_leaves_no_trace_and_does_not_wait(mode):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), Counter()).cuda()
    x = torch.randn(8, 3, device="cuda")
    torch.cuda.manual_seed(3)
    torch.rand(5, device="cuda")
    states, values = torch.cuda.get_rng_state_all(), {k: v.clone() for k, v in model.state_dict().items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = score(model, x, mode=mode, autocast=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(torch.cuda.get_rng_state_all(), states, strict=True))
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
