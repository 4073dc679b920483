"""How models are run: precision, dropout, checkpoints, compilation, odd inputs and outputs."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.grad_norms.cases.parameters import small
from tests.grad_norms.problem import EITHER, EXACT, REFUSED, Problem, case, wave


@case("Precision", "autocast bfloat16", tolerance=1e-2, half=True)
def autocast():
    def loss(model, inputs, shared):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*inputs)
        return wave(output.float() if output.dtype == torch.bfloat16 else output)

    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16))
    return Problem(model, (torch.randn(6, 5, 24),), loss=loss)


@case("Precision", "autocast bfloat16, convolutions", tolerance=1e-2, half=True)
def autocast_convolutions():
    def loss(model, inputs, shared):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*inputs)
        return wave(output.float() if output.dtype == torch.bfloat16 else output)

    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2))
    return Problem(model, (torch.randn(6, 3, 9, 8),), loss=loss)


@case("Precision", "a bfloat16 model", tolerance=1e-2, half=True)
def bfloat16_model():
    def loss(model, inputs, shared):
        return wave(model(inputs[0].to(next(model.parameters()).dtype)).to(inputs[0].dtype))

    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16)).bfloat16()
    return Problem(model, (torch.randn(6, 5, 24),), loss=loss)


def seeded_losses():
    """One forward over the batch with fixed masks, each sample's loss differentiated apart."""
    mask_seed = int(torch.randint(1 << 30, ()))

    def losses(model, inputs, shared):
        torch.manual_seed(mask_seed)
        return (1.3 * model(*inputs) + 0.4).sin().flatten(1).sum(1)

    return losses


@case("Random", "dropout with a fixed seed")
def dropout():
    model = nn.Sequential(
        nn.Linear(6, 9), nn.Dropout(0.4), nn.Linear(9, 9), nn.ReLU(), nn.Dropout(0.4), nn.Linear(9, 3)
    )
    return Problem(model, (torch.randn(5, 4, 6),), losses=seeded_losses())


@case("Random", "Dropout2d after a convolution")
def dropout2d():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout2d(0.4), nn.Conv2d(6, 3, 3))
    return Problem(model, (torch.randn(5, 3, 7, 6),), losses=seeded_losses())


@case("Random", "stochastic depth")
def stochastic_depth():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            keep = (torch.rand(len(x), 1) < 0.6).to(x)
            return self.head(x + keep * self.block(x).tanh())

    return Problem(Depth(), (torch.randn(8, 6),), losses=seeded_losses())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, twice: bool = False):
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(6, 8), nn.Linear(8, 3), reentrant
        self.block, other = self.make(), self.make()
        self.other = self.block if twice else other

    @staticmethod
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 8))

    def forward(self, x):
        x = self.first(x)
        x = x + checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.last(checkpoint(self.other, x, use_reentrant=self.reentrant))


for reentrant in (False, True):

    @case("Checkpoint", f"use_reentrant={reentrant}")
    def checkpointed(reentrant=reentrant):
        return Problem(Checkpointed(reentrant), (torch.randn(5, 4, 6),))

    @case("Checkpoint", f"use_reentrant={reentrant}, N = T", EXACT)
    def checkpointed_square(reentrant=reentrant):
        return Problem(Checkpointed(reentrant), (torch.randn(4, 4, 6),))

    @case("Checkpoint", f"use_reentrant={reentrant}, one block twice", EITHER if reentrant else EXACT)
    def checkpointed_twice(reentrant=reentrant):
        return Problem(Checkpointed(reentrant, twice=True), (torch.randn(5, 4, 6),))

    @case("Checkpoint", f"use_reentrant={reentrant}, around the whole model", EITHER if reentrant else EXACT)
    def checkpointed_whole(reentrant=reentrant):
        def loss(model, inputs, shared):
            x = inputs[0].clone().requires_grad_()
            return wave(checkpoint(model, x, use_reentrant=reentrant))

        return Problem(small(), (torch.randn(5, 4, 6),), loss=loss)


class NestedCheckpoints(nn.Module):
    """A segment with checkpoints inside, and a layer between them that only the outer one covers."""

    def __init__(self, outer: bool, inner: bool):
        super().__init__()
        self.outer, self.inner = outer, inner
        self.first, self.between, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.one, self.two = Checkpointed.make(), Checkpointed.make()

    def segment(self, x):
        x = x + checkpoint(self.one, x, use_reentrant=self.inner)
        return checkpoint(self.two, self.between(x), use_reentrant=self.inner)

    def forward(self, x):
        return self.last(checkpoint(self.segment, self.first(x), use_reentrant=self.outer))


for outer in (False, True):
    for inner in (False, True):
        both = outer and inner

        @case(
            "Checkpoint",
            f"nested, use_reentrant={outer} around use_reentrant={inner}",
            REFUSED if both else EXACT,
            "use_reentrant=False" if both else "",
        )
        def nested_checkpoints(outer=outer, inner=inner):
            return Problem(NestedCheckpoints(outer, inner), (torch.randn(5, 4, 6),))


COMPILED = {
    "backend='eager'": {"backend": "eager"},
    "backend='aot_eager', fullgraph=True": {"backend": "aot_eager", "fullgraph": True},
    "inductor": {},
}
for name, options in COMPILED.items():

    @case("Compiled", f"torch.compile(model), {name}", EITHER, "compile", identical=False)
    def compiled(options=options):
        def inside(model, inputs, shared):
            torch._dynamo.reset()
            return wave(torch.compile(model, **options)(*inputs))

        return Problem(small(), (torch.randn(5, 4, 6),), inside=inside)


@case("Compiled", "model.compile()", EITHER, "compile", identical=False)
def compiled_in_place():
    torch._dynamo.reset()
    model = small()
    model.compile(backend="aot_eager")
    return Problem(model, (torch.randn(5, 4, 6),))


@case("Compiled", "compiled and called before the context", EITHER, "compile", identical=False)
def compiled_warm():
    torch._dynamo.reset()
    model, x = small(), torch.randn(5, 4, 6)
    compiled = torch.compile(model, backend="aot_eager")
    wave(compiled(x)).backward()
    model.zero_grad(set_to_none=True)
    return Problem(model, (x,), inside=lambda model, inputs, shared: wave(compiled(*inputs)))


@case("Compiled", "the context given the compiled model", EITHER, "compile", identical=False)
def compiled_given():
    torch._dynamo.reset()
    return Problem(torch.compile(small(), backend="aot_eager"), (torch.randn(5, 4, 6),))


@case("Compiled", "a compiled submodule", EITHER, "compile", identical=False)
def compiled_part():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.block = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), backend="aot_eager")

        def forward(self, x):
            return self.block(self.first(x))

    return Problem(Part(), (torch.randn(5, 4, 6),))


@case("Compiled", "a scripted submodule", REFUSED, "script|weight")
def scripted():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    return Problem(nn.Sequential(nn.Linear(6, 6), scripted), (torch.randn(5, 6),))


@case("Compiled", "a traced submodule", REFUSED, "script|trace|weight")
def traced():
    traced = torch.jit.trace(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torch.randn(5, 6))
    return Problem(nn.Sequential(nn.Linear(6, 6), traced), (torch.randn(5, 6),))


class ScaleBy(torch.autograd.Function):
    """x * p, with a parameter."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x * p

    @staticmethod
    def backward(ctx, grad):
        x, p = ctx.saved_tensors
        return grad * p, (grad * x).flatten(0, -2).sum(0)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Mean(torch.autograd.Function):
    """The batch mean subtracted, out of sight."""

    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0)


class Custom(nn.Module):
    def __init__(self, parameter: bool):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.randn(6)) if parameter else None

    def forward(self, x):
        x = self.first(x)
        return self.last(Square.apply(x) if self.scale is None else ScaleBy.apply(x, self.scale))


@case("Custom Function", "takes a parameter", REFUSED, "scale")
def custom_parameter():
    return Problem(Custom(True), (torch.randn(5, 4, 6),))


@case("Custom Function", "takes only activations")
def custom_activation():
    return Problem(Custom(False), (torch.randn(5, 4, 6),))


@case("Custom Function", "takes only activations, changes the order of dimensions", EITHER)
def custom_transposing():
    class Transpose(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.transpose(0, 1).contiguous()

        @staticmethod
        def backward(ctx, grad):
            return grad.transpose(0, 1)

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(Transpose.apply(self.first(x))).transpose(0, 1)

    return Problem(Inner(), (torch.randn(4, 4, 6),))


@case("Custom Function", "takes only activations, mixes the batch", REFUSED)
def custom_mixing():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.last(Mean.apply(self.first(x)))

    return Problem(Inner(), (torch.randn(5, 6),))


@case("In place", "ReLU after a convolution")
def relu_in_place():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    return Problem(model, (torch.randn(4, 3, 6, 6),))


@case("In place", "ReLU after a Linear and a norm")
def relu_after_linear():
    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(inplace=True), nn.LayerNorm(6), nn.SiLU(inplace=True), nn.Linear(6, 2)
    )
    return Problem(model, (torch.randn(4, 3, 6),))


@case("In place", "a slice of the output written")
def written_slice():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            out = self.first(x)
            out[:, 0] = self.second(x[:, 0])
            return out.tanh()

    return Problem(Written(), (torch.randn(5, 4, 6),))


@case("In place", "a buffer of zeros filled by position")
def filled():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 3)

        def forward(self, x):
            out = x.new_zeros(len(x), 4, 3)
            for t in range(4):
                out[:, t] = self.first(x[:, t] * (t + 1))
            return out

    return Problem(Filled(), (torch.randn(5, 4, 6),))


@case("In place", "rows written in another order", EITHER)
def rows_written():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            out = torch.zeros_like(x)
            out[torch.tensor([1, 2, 3, 4, 0])] = self.first(x).tanh()
            return self.last(out)[torch.tensor([1, 2, 3, 4, 0])]

    return Problem(Rows(), (torch.randn(5, 6),), losses=lambda m, i, s: (1.3 * m(*i) + 0.4).sin().sum(1))


class Dictionary(nn.Module):
    """Keyword inputs, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Embedding(7, 4)

    def forward(self, pixels, ids, flag: bool = True):
        image, text = self.image(pixels), self.text(ids).mean(1)
        return {"both": image * text, "parts": [image.tanh(), (text,)], "flag": flag}


@case("Inputs and outputs", "keywords in, a dict out")
def dictionary():
    return Problem(Dictionary(), {"pixels": torch.randn(5, 6), "ids": torch.randint(7, (5, 3))})


@case("Inputs and outputs", "one dict in, nested lists out")
def nested():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Dictionary()

        def forward(self, batch):
            out = self.inner(batch["a"]["pixels"], batch["b"][0])
            return [out["both"], out["parts"]]

    def loss(model, inputs, shared):
        return wave(model(inputs))

    return Problem(Nested(), {"a": {"pixels": torch.randn(5, 6)}, "b": [torch.randint(7, (5, 3))]}, loss=loss)


@case("Inputs and outputs", "part of the outputs used")
def partly_used():
    def loss(model, inputs, shared):
        return wave(model(**inputs)["parts"][0])

    return Problem(Dictionary(), {"pixels": torch.randn(5, 6), "ids": torch.randint(7, (5, 3))}, loss=loss)


@case("Inputs and outputs", "the model returns the losses")
def returns_losses():
    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small()

        def forward(self, x, y):
            return F.cross_entropy(self.body(x), y, reduction="none")

    inputs = (torch.randn(5, 6), torch.randint(3, (5,)))
    return Problem(Losses(), inputs, loss=lambda model, inputs, shared: model(*inputs).sum())


@case("Inputs and outputs", "the model returns the loss sum")
def returns_sum():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small()

        def forward(self, x, y):
            return F.cross_entropy(self.body(x), y, reduction="sum")

    inputs = (torch.randn(5, 6), torch.randint(3, (5,)))
    return Problem(Sum(), inputs, loss=lambda model, inputs, shared: model(*inputs))


@case("Inputs and outputs", "a constant the model makes, N = its length")
def constant():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.made = nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, x):  # made() sees four rows that are not samples; the batch has four
            return self.layer(x)[:, None] * self.made(torch.eye(4, 3).to(x))

    return Problem(Constant(), (torch.randn(4, 6),))


@case("Inputs and outputs", "learned queries through a layer, N = queries", EITHER)
def queries():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.layer = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(self.queries).tanh() @ x.transpose(1, 2)

    return Problem(Queries(), (torch.randn(4, 5, 6),))


@case("Inputs and outputs", "squeezed, N = 1", EITHER)
def squeezed():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.first(x).squeeze().tanh())

    return Problem(Squeezed(), (torch.randn(1, 6),))


@case("Inputs and outputs", "a lazy layer", EITHER)
def lazy():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(4)

        def forward(self, x):
            return self.layer(x)

    model = Lazy()
    model(torch.randn(2, 6))
    return Problem(model, (torch.randn(5, 6),))
