"""Which parameters, and how they enter: frozen, bare, functional, sliced, restricted, outside the model."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.grad_norms.problem import EITHER, EXACT, REFUSED, Problem, case, wave


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def frozen(*names: str):
    def build():
        model = small()
        for name, p in model.named_parameters():
            p.requires_grad_(name not in names)
        return Problem(model, (torch.randn(5, 4, 6),))

    return build


for names in (
    ("0.bias",),
    ("0.weight",),
    ("0.weight", "0.bias"),
    ("2.weight",),
    ("2.weight", "2.bias"),
    ("3.weight",),
    ("0.weight", "0.bias", "2.weight", "2.bias"),
):
    case("Frozen", ", ".join(names))(frozen(*names))


@case("Frozen", "a convolution's bias")
def frozen_conv_bias():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    model[0].bias.requires_grad_(False)
    return Problem(model, (torch.randn(4, 3, 6, 6),))


@case("Frozen", "the features run under no_grad")
def no_grad_features():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.features(x)
            return self.head(x)

    return Problem(Head(), (torch.randn(5, 6),))


@case("Frozen", "a detached branch")
def detached():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            return self.online(x) * self.target(x).detach()

    return Problem(Branch(), (torch.randn(5, 6),))


@case("Frozen", "a parameter that the forward does not use")
def unused():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            return self.used(x)

    return Problem(Unused(), (torch.randn(5, 6),))


class Bare(nn.Module):
    """A layer, then a bare parameter `p` in `use`."""

    def __init__(self, shape, use, d: int = 6):
        super().__init__()
        self.layer, self.p, self.use = nn.Linear(6, d), nn.Parameter(torch.randn(shape)), use

    def forward(self, x):
        return self.use(self.layer(x), self.p)


# name: (shape of the parameter, its use, shape of the batch)
BARE = {
    "[d] added": ((6,), lambda x, p: x + p, (5, 6)),
    "[d] added, 3-D": ((6,), lambda x, p: x + p, (5, 4, 6)),
    "[d] multiplied (LayerScale)": ((6,), lambda x, p: p * x.tanh(), (5, 4, 6)),
    "[1, T, d] added (positions)": ((1, 4, 6), lambda x, p: x + p, (5, 4, 6)),
    "[T, d] added": ((4, 6), lambda x, p: x + p, (5, 4, 6)),
    "[T, d] added, N = T": ((4, 6), lambda x, p: x + p, (4, 4, 6)),
    "[T, 1] multiplied, N = T": ((4, 1), lambda x, p: x * p, (4, 4, 6)),
    "[T, d] added, N = T = d": ((6, 6), lambda x, p: x + p, (6, 6, 6)),
    "scalar multiplied (temperature)": ((), lambda x, p: x * p.exp(), (5, 4, 6)),
    "[1] divided by": ((1,), lambda x, p: x / (p.square() + 1), (5, 6)),
    "subtracted and squared (prototype)": ((3, 6), lambda x, p: (x[:, None] - p).square().sum(-1), (5, 6)),
    "used twice": ((6,), lambda x, p: x * p + p.tanh(), (5, 4, 6)),
    "sliced": ((9, 6), lambda x, p: x + p[: x.shape[1]], (5, 4, 6)),
    "expand and cat (class token)": (
        (1, 1, 6),
        lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1).tanh(),
        (5, 4, 6),
    ),
    "expand_as and cat": ((6,), lambda x, p: torch.cat([p.expand_as(x[:, :1]), x], 1), (5, 4, 6)),
    "repeat and cat": ((1, 2, 6), lambda x, p: torch.cat([p.repeat(len(x), 1, 1), x], 1), (5, 4, 6)),
    "by torch.where (mask token)": ((6,), lambda x, p: torch.where(x > 0, x, p), (5, 4, 6)),
    "written into a slice": ((6,), lambda x, p: x.index_copy(1, torch.tensor([0]), p.expand(len(x), 1, 6)), (5, 4, 6)),
    "added in place": ((6,), lambda x, p: x.clone().add_(p), (5, 4, 6)),
    "addcmul": ((6,), lambda x, p: torch.addcmul(x, x.tanh(), p), (5, 4, 6)),
    "lerp": ((6,), lambda x, p: torch.lerp(x, x.tanh(), p), (5, 4, 6)),
    "maximum": ((6,), lambda x, p: torch.maximum(x, p), (5, 4, 6)),
    "clamped by": ((6,), lambda x, p: x.clamp(min=p), (5, 4, 6)),
    "pow": ((6,), lambda x, p: x.abs().add(0.1) ** p, (5, 4, 6)),
    "F.linear": ((3, 6), lambda x, p: F.linear(x, p), (5, 4, 6)),
    "F.linear, T = 1": ((3, 6), lambda x, p: F.linear(x, p), (5, 6)),
    "x @ p": ((6, 3), lambda x, p: x @ p, (5, 4, 6)),
    "x @ p.t()": ((3, 6), lambda x, p: x @ p.t(), (5, 4, 6)),
    "x @ p.t(), 2-D": ((3, 6), lambda x, p: x @ p.t(), (5, 6)),
    "x @ vector": ((6,), lambda x, p: x @ p, (5, 4, 6)),
    "p @ x": ((3, 4), lambda x, p: p @ x, (5, 4, 6)),
    "p @ x, N = T": ((4, 4), lambda x, p: p @ x, (4, 4, 6)),
    "einsum btd,pd->btp": ((3, 6), lambda x, p: torch.einsum("btd,pd->btp", x, p), (5, 4, 6)),
    "einsum, heads": ((2, 6, 3), lambda x, p: torch.einsum("btd,hdk->bhtk", x, p), (5, 4, 6)),
    "einsum, bilinear": ((6, 6), lambda x, p: torch.einsum("btd,de,bse->bts", x, p, x), (5, 4, 6)),
    "einsum over positions": ((4, 3), lambda x, p: torch.einsum("btd,tk->bkd", x, p), (5, 4, 6)),
    "addmm": ((6, 3), lambda x, p: torch.addmm(torch.ones(3).to(x), x, p), (5, 6)),
    "bmm with an expanded weight": ((6, 3), lambda x, p: torch.bmm(x, p.expand(len(x), 6, 3)), (5, 4, 6)),
    "tensordot": ((6, 3), lambda x, p: torch.tensordot(x, p, dims=1), (5, 4, 6)),
    "inner": ((3, 6), lambda x, p: torch.inner(x, p), (5, 4, 6)),
    "F.conv1d": ((3, 4, 3), lambda x, p: F.conv1d(x, p, padding=1), (5, 4, 6)),
    "F.layer_norm": ((6,), lambda x, p: F.layer_norm(x, (6,), p), (5, 4, 6)),
    "F.rms_norm": ((6,), lambda x, p: F.rms_norm(x, (6,), p), (5, 4, 6)),
    "F.group_norm": ((4,), lambda x, p: F.group_norm(x, 2, p), (5, 4, 6)),
    "F.prelu": ((4,), lambda x, p: F.prelu(x, p), (5, 4, 6)),
    "F.bilinear": ((3, 6, 6), lambda x, p: F.bilinear(x, x.tanh(), p), (5, 6)),
    "the weight cast (.to, .float)": ((3, 6), lambda x, p: F.linear(x, p.to(x.dtype)), (5, 4, 6)),
    "the weight sliced (slimmable)": ((5, 9), lambda x, p: F.linear(x, p[:3, :6]), (5, 4, 6)),
    "the weight in chunks (fused qkv)": (
        (9, 6),
        lambda x, p: F.linear(x, p.chunk(3)[0]) * F.linear(x, p[3:6]) + F.linear(x.tanh(), p.split(3)[2]),
        (5, 4, 6),
    ),
    "the weight masked": ((6, 6), lambda x, p: F.linear(x, p * torch.eye(6).flip(0).add(0.5).to(x)), (5, 4, 6)),
    "the weight scaled (equalised rate)": ((3, 6), lambda x, p: F.linear(x, 0.3 * p), (5, 4, 6)),
    "the weight's exponential": ((3, 6), lambda x, p: F.linear(x, p.exp()), (5, 4, 6)),
    "the weight normalised (cosine classifier)": (
        (3, 6),
        lambda x, p: F.linear(F.normalize(x, dim=-1), F.normalize(p, dim=1)),
        (5, 6),
    ),
    "two weights multiplied (low rank)": ((2, 3, 6), lambda x, p: F.linear(x, p[0].t() @ p[1]), (5, 4, 6)),
    "a state-space scan": ((6,), lambda x, p: scan(x, p), (5, 4, 6)),
    "statistics of the parameter alone": ((6,), lambda x, p: x * p.softmax(0), (5, 4, 6)),
    "cat of parameter slices": ((6,), lambda x, p: x + torch.cat([p[3:], p[:3]]), (5, 4, 6)),
    "outer product": ((3,), lambda x, p: x[..., None] * p, (5, 4, 6)),
}
for name, (shape, use, batch) in BARE.items():

    @case("Bare parameter", name, EITHER, r"\bp\b")
    def bare(shape=shape, use=use, batch=batch):
        d = batch[-1]
        model = Bare(shape, use, d)
        model.layer = nn.Linear(d, d)
        return Problem(model, (torch.randn(batch),))


def scan(x, p):
    state, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = p.sigmoid() * state + x[:, t]
        out.append(state)
    return torch.stack(out, 1)


class Use(nn.Module):
    """A Linear whose own tensors are used by hand."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(6, 3), use

    def forward(self, x):
        return self.use(x, self.layer.weight, self.layer.bias)


for name, use in {
    "F.linear(x, weight, bias)": F.linear,
    "x @ weight.t() + bias": lambda x, w, b: x @ w.t() + b,
    "einsum": lambda x, w, b: torch.einsum("btd,pd->btp", x, w) + b,
    "matmul(x, weight.T)": lambda x, w, b: torch.matmul(x, w.T),
}.items():

    @case("Functional", name, EITHER if name == "einsum" else EXACT)
    def functional(use=use):
        return Problem(Use(use), (torch.randn(5, 4, 6),))


@case("Functional", "x @ weight.t(), N = T = d")
def functional_square():
    return Problem(Use(lambda x, w, b: x @ w.t() + b), (torch.randn(6, 6, 6),))


@case("Functional", "ParameterList and ParameterDict", EITHER)
def parameter_list():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
            self.biases = nn.ParameterDict({"a": nn.Parameter(torch.randn(6))})

        def forward(self, x):
            for w in self.weights:
                x = F.linear(x, w, self.biases["a"]).tanh()
            return x

    return Problem(Lists(), (torch.randn(5, 4, 6),))


@case("Functional", "functional_call with the model's own parameters", EITHER)
def functional_call():
    def loss(model, inputs, shared):
        return wave(torch.func.functional_call(model, dict(model.named_parameters()), inputs))

    return Problem(small(), (torch.randn(5, 6),), loss=loss)


@case("Outside the model", "a weight of the model in the loss", EITHER, "weight")
def outside():
    def loss(model, inputs, shared):
        return wave(F.linear(model(*inputs), model[0].weight[:, :3]))

    return Problem(small(), (torch.randn(5, 6),), loss=loss)


@case("Outside the model", "a weight before the model", EITHER, "weight")
def before():
    def loss(model, inputs, shared):
        return wave(model(inputs[0] * model[0].weight[0]))

    return Problem(small(), (torch.randn(5, 6),), loss=loss)


@case("Outside the model", "two models in one loss")
def two_models():
    other = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss(model, inputs, shared):
        partner = copy.deepcopy(other).to(next(model.parameters()).dtype)
        return wave(model(inputs[0]) * partner(inputs[0]))

    return Problem(small(), (torch.randn(5, 6),), loss=loss)


@case("Outside the model", "another model feeds this one")
def fed():
    other = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def loss(model, inputs, shared):
        partner = copy.deepcopy(other).to(next(model.parameters()).dtype)
        return wave(model(partner(inputs[0])))

    return Problem(small(), (torch.randn(5, 6),), loss=loss)


@case("Outside the model", "gradient penalty (double backward)", EITHER)
def gradient_penalty():
    def loss(model, inputs, shared):
        x = inputs[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(wave(model(x)), x, create_graph=True)
        return slope.square().sum()

    return Problem(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (torch.randn(5, 6),), loss=loss)


RESTRICTED = {
    "one name": (lambda model: "0.weight", {"0.weight"}),
    "a sequence of names": (lambda model: ["0.weight", "3.bias"], {"0.weight", "3.bias"}),
    "parameters": (lambda model: [model[2].weight, model[3].weight], {"2.weight", "3.weight"}),
    "modules": (lambda model: [model[0], model[2]], {"0.weight", "0.bias", "2.weight", "2.bias"}),
    "a generator": (lambda model: model[3].parameters(), {"3.weight", "3.bias"}),
    "a module's name": (lambda model: ["3"], {"3.weight", "3.bias"}),
    "all of them": (lambda model: list(model.parameters()), None),
}
for name, (pick, counted) in RESTRICTED.items():

    @case("parameters=", name)
    def restricted(pick=pick, counted=counted):
        model = small()
        problem = Problem(model, (torch.randn(5, 4, 6),), options={"parameters": pick(model)})
        if counted is not None:
            problem.counted = counted.__contains__
        return problem


@case("parameters=", "an unknown name", REFUSED, "nonsense")
def unknown_name():
    return Problem(small(), (torch.randn(5, 4, 6),), options={"parameters": ["0.weight", "nonsense"]})


@case("parameters=", "a parameter of another model", REFUSED)
def foreign_parameter():
    return Problem(small(), (torch.randn(5, 4, 6),), options={"parameters": [nn.Parameter(torch.randn(3))]})
