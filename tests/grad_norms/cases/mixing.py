"""Samples that meet: what depends on other rows of the batch has no per-sample gradient and is refused; rows that only
move must be followed or refused."""

import torch
from torch import nn

from tests.grad_norms.problem import EITHER, REFUSED, Problem, case, wave


class Between(nn.Module):
    """A layer, an operation over the batch, another layer."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.operation, self.last = nn.Linear(6, 6), operation, nn.Linear(6, 4)

    def forward(self, x):
        return self.last(self.operation(self.first(x)))


MIXED = {
    "batch mean subtracted": lambda x: x - x.mean(0),
    "batch maximum subtracted": lambda x: x - x.amax(0, keepdim=True),
    "softmax over the batch": lambda x: x.softmax(0),
    "similarities of all pairs": lambda x: x @ x.t() @ x,
    "cumulative sum over the batch": lambda x: x.cumsum(0),
    "neighbour added": lambda x: x + x.roll(1, 0),
    "norm of the whole batch": lambda x: x / x.norm(),
    "sum over everything": lambda x: x * x.tanh().sum(),
    "first row for all": lambda x: x + x[:1],
    "first row for all, by select": lambda x: x + x[0],
    "transposed product": lambda x: x @ (x.t() @ x),
    "sorted along the batch": lambda x: x.sort(0).values,
    "statistics in a convolution over the batch": lambda x: nn.functional.avg_pool1d(x.t()[None], 3, 1, 1)[0].t(),
    "attention over the batch": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "layer_norm over the batch": lambda x: nn.functional.layer_norm(x, x.shape),
    "einsum over the batch": lambda x: torch.einsum("nd,me->ne", x, x),
}
for name, operation in MIXED.items():

    @case("Mixed samples", name, REFUSED)
    def mixed(operation=operation):
        return Problem(Between(operation), (torch.randn(6, 6),))


# In the loss, where nothing of the model is left to see it: documented as the gradient through the sample's own rows, the
# others' taken as constants.
@case("Mixed samples", "contrastive loss (through the sample's rows, the others constant)", EITHER)
def contrastive():
    def loss_of(z):
        z = nn.functional.normalize(z)
        return nn.functional.cross_entropy(z @ z.t() / 0.3, torch.arange(len(z)), reduction="sum")

    def losses(model, inputs, shared):
        z = model(inputs[0])
        own = torch.eye(len(z), dtype=torch.bool)[..., None]
        return torch.stack([loss_of(torch.where(row, z, z.detach())) for row in own])

    def inside(model, inputs, shared):
        return loss_of(model(inputs[0]))

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return Problem(model, (torch.randn(6, 6),), losses=losses, inside=inside)


@case("Mixed samples", "square of the summed loss (through the sample's rows, the others constant)", EITHER)
def squared_loss():
    def losses(model, inputs, shared):
        each = wave_of_rows(model, inputs, shared)
        return 2 * each.sum().detach() * each

    def inside(model, inputs, shared):
        return wave(model(*inputs)).square()

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return Problem(model, (torch.randn(6, 6),), losses=losses, inside=inside)


@case("Mixed samples", "a regularizer in the loss", REFUSED)
def regularizer():
    def loss(model, inputs, shared):
        return wave(model(*inputs)) + 0.1 * model[0].weight.square().sum()

    return Problem(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), (torch.randn(6, 6),), loss=loss)


MOVED = {
    "flipped and back": lambda x: x.flip(0).tanh().flip(0),
    "two copies by cat": lambda x: torch.cat([x, -x]).tanh().chunk(2)[0],
    "two copies by repeat": lambda x: x.repeat(2, 1).tanh()[: len(x)],
    "two copies by repeat_interleave": lambda x: x.repeat_interleave(2, 0).tanh().view(len(x), 2, -1).sum(1),
    "split and joined": lambda x: torch.cat([part.tanh() for part in x.split(2)]),
    "unbound and stacked": lambda x: torch.stack([row.tanh() for row in x.unbind()]),
    "transposed and back": lambda x: x.t().tanh().t(),
    "einsum with the batch kept": lambda x: torch.einsum("nd,ne->nde", x, x).sum(2),
    "einsum with the batch moved": lambda x: torch.einsum("nd,ne->dne", x, x).sum(0),
    "movedim": lambda x: x[:, :, None].movedim(0, 2).tanh().movedim(2, 0).squeeze(-1),
}
for name, operation in MOVED.items():

    @case("Moved samples", name, EITHER)
    def moved(operation=operation):
        return Problem(Between(operation), (torch.randn(6, 6),))


class Through(nn.Module):
    """A layer on rows that were moved, and moved back."""

    def __init__(self, there, back):
        super().__init__()
        self.there, self.back, self.layer = there, back, nn.Linear(6, 6)

    def forward(self, x):
        return self.back(self.layer(self.there(x)))


THROUGH = {
    "flipped": (lambda x: x.flip(0), lambda y: y.flip(0)),
    "rolled": (lambda x: x.roll(1, 0), lambda y: y.roll(-1, 0)),
    "permuted by an index": (
        lambda x: x[torch.tensor([2, 0, 1, 5, 3, 4])],
        lambda y: y[torch.tensor([1, 2, 0, 4, 5, 3])],
    ),
    "sorted by length (index_select)": (
        lambda x: x.index_select(0, torch.tensor([5, 4, 3, 2, 1, 0])),
        lambda y: y.index_select(0, torch.tensor([5, 4, 3, 2, 1, 0])),
    ),
    "two copies by cat": (lambda x: torch.cat([x, 2 * x]), lambda y: y[:6] * y[6:]),
    "two copies by repeat": (lambda x: x.repeat(2, 1), lambda y: y[:6].tanh() + y[6:]),
    "two copies by repeat_interleave": (
        lambda x: x.repeat_interleave(2, 0),
        lambda y: y.view(6, 2, 6).prod(1),
    ),
    "copies by expand and flatten": (
        lambda x: (x[:, None] * torch.tensor([1.0, 2.0, 3.0]).to(x)[:, None]).flatten(0, 1),
        lambda y: y.view(6, 3, 6).prod(1),
    ),
    "copies, copy first": (
        lambda x: torch.stack([x, 2 * x, 3 * x]).flatten(0, 1),
        lambda y: y.view(3, 6, 6).prod(0),
    ),
    "half of the batch": (lambda x: x[:3], lambda y: y),
    "every second row": (lambda x: x[::2], lambda y: y),
    "rows by a mask": (lambda x: x[torch.tensor([True, False, True, True, False, True])], lambda y: y),
    "rows times T, N = T": (lambda x: x[:, None] * x[:, :, None], lambda y: y.sum(1)),
    "rows times T, batch second": (lambda x: x * torch.arange(1.0, 7.0).to(x)[:, None, None], lambda y: y.sum(0)),
}
FEWER = ("half of the batch", "every second row", "rows by a mask")


def wave_of_rows(model, inputs, shared):
    return (1.3 * model(*inputs) + 0.4).sin().flatten(1).sum(1)


for name, (there, back) in THROUGH.items():

    @case("Moved samples", f"a layer on rows {name}", EITHER)
    def through(name=name, there=there, back=back):
        def losses_of_kept(model, inputs, shared):
            kept = wave_of_rows(model, inputs, shared)
            return torch.zeros(6).to(kept).index_add(0, there(torch.arange(6)), kept)  # the others' are zero

        losses = losses_of_kept if name in FEWER else wave_of_rows
        return Problem(Through(there, back), (torch.randn(6, 6),), losses=losses)


@case("Moved samples", "rows swapped between losses (mixup of inputs and targets)", EITHER)
def mixup():
    """The mixed inputs are made before the model: each row is a sample of its own."""
    x = torch.randn(6, 6)
    return Problem(nn.Linear(6, 4), (0.3 * x + 0.7 * x.flip(0),))


@case("Moved samples", "samples dropped before the loss", EITHER)
def dropped():
    def losses(model, inputs, shared):
        return (1.3 * model(*inputs) + 0.4).sin().sum(1) * torch.tensor([1.0, 0, 1, 0, 1, 1]).to(inputs[0])

    return Problem(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(6, 6),), losses=losses)


@case("Moved samples", "chosen rows only in the loss")
def chosen_rows():
    """As selected_cross_entropy does: the others have norm zero."""
    chosen = torch.tensor([4, 1])

    def losses(model, inputs, shared):
        rows = (1.3 * model(*inputs)[chosen] + 0.4).sin().sum(1)
        return torch.zeros(6).to(rows).index_add(0, chosen, rows)

    return Problem(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(6, 6),), losses=losses)


@case("Moved samples", "weights of the samples in the loss")
def weighted():
    def losses(model, inputs, shared):
        return (1.3 * model(inputs[0]) + 0.4).sin().sum(1) * inputs[1]

    return Problem(nn.Linear(6, 4), (torch.randn(6, 6), torch.rand(6)), losses=losses)


class Stepwise(nn.Module):
    """LSTMCell, a step at a time."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(6, 4)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0]


class WithState(nn.Module):
    """A GRU whose first state [1, N, d] comes from the input."""

    def __init__(self):
        super().__init__()
        self.start, self.layer = nn.Linear(6, 4), nn.GRU(6, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x, self.start(x[:, 0])[None])[0]


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(6, 4, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 4, 3, 2, 1]), batch_first=True)
        return self.layer(packed)[1][0]


class Weighted(nn.Module):
    """A parameter p in an operation without a rule."""

    def __init__(self, shape, use):
        super().__init__()
        self.layer, self.p, self.use = nn.Linear(6, 6), nn.Parameter(torch.randn(shape)), use

    def forward(self, x):
        return self.use(self.layer(x), self.p)


FALLBACK = {
    "LSTMCell, called in turn": Stepwise,
    "GRU with a first state": WithState,
    "GRU on a packed sequence": Packed,
    "einsum btd,pd->btp": lambda: Weighted((3, 6), lambda x, p: torch.einsum("btd,pd->btp", x, p)),
    "einsum, heads": lambda: Weighted((2, 6, 3), lambda x, p: torch.einsum("btd,hdk->bhtk", x, p)),
    "p @ x": lambda: Weighted((3, 4), lambda x, p: p @ x),
    "tensordot": lambda: Weighted((6, 3), lambda x, p: torch.tensordot(x, p, dims=1)),
    "tensordot over the positions": lambda: Weighted((4, 3), lambda x, p: torch.tensordot(x, p, dims=([1], [0]))),
    "clamp": lambda: Weighted((6,), lambda x, p: x.clamp(min=p)),
    "clamp by positions": lambda: Weighted((4, 6), lambda x, p: x.clamp(min=p)),
    "bmm of an expanded weight": lambda: Weighted((6, 3), lambda x, p: torch.bmm(x, p.expand(len(x), 6, 3))),
    "softmax over all of a product": lambda: Weighted(
        (3, 6), lambda x, p: torch.einsum("btd,pd->btp", x, p).softmax(1)
    ),
    "indexing": lambda: Weighted((5, 6), lambda x, p: x + p[torch.tensor([0, 1, 1, 3])]),
}
for name, make in FALLBACK.items():
    for n in (5, 4):
        if name.endswith("sequence") and n == 4:
            continue

        @case("Fallback per_sample", f"{name}, N = {n}, T = 4", EITHER)
        def fallback(make=make, n=n):
            return Problem(make(), (torch.randn(n, 4, 6),), options={"fallback": "per_sample"})


@case("Fallback per_sample", "Bilinear", EITHER)
def fallback_bilinear():
    return Problem(nn.Bilinear(4, 3, 5), (torch.randn(5, 4), torch.randn(5, 3)), options={"fallback": "per_sample"})


@case("Fallback per_sample", "EmbeddingBag", EITHER)
def fallback_bag():
    model = nn.EmbeddingBag(7, 6, mode="mean")
    return Problem(model, (torch.randint(7, (5, 4)),), options={"fallback": "per_sample"})


@case("Fallback per_sample", "LSTM with dropout between its layers: the masks cannot be drawn again", REFUSED)
def fallback_dropout():
    seed = int(torch.randint(1 << 30, ()))

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(6, 4, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0]

    def losses(model, inputs, shared):
        torch.manual_seed(seed)
        return wave_of_rows(model, inputs, shared)

    return Problem(Inner(), (torch.randn(5, 4, 6),), losses=losses, options={"fallback": "per_sample"})


@case("Fallback per_sample", "a batch mean in the operation's way", REFUSED)
def fallback_mixed():
    model = Weighted((3, 6), lambda x, p: torch.einsum("btd,pd->btp", x - x.mean(0), p))
    return Problem(model, (torch.randn(5, 4, 6),), options={"fallback": "per_sample"})


@case("Fallback per_sample", "an operation that mixes the batch", REFUSED)
def fallback_mixing_operation():
    model = Weighted((6, 6), lambda x, p: torch.einsum("btd,de,cte->btc", x, p, x))
    return Problem(model, (torch.randn(5, 4, 6),), options={"fallback": "per_sample"})


@case("Fallback per_sample", "BatchNorm in training mode", REFUSED, "BatchNorm")
def fallback_batch_norm():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    return Problem(model, (torch.randn(5, 6),), options={"fallback": "per_sample"})
