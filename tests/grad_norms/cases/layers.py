"""One layer at a time: linear, convolution, embedding and normalisation, with every option that changes the arithmetic."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.grad_norms.problem import EITHER, REFUSED, Problem, case, module_case

# Linear: the shapes make T = 1, the direct product (T large) and the Gram matrix (T small) each the cheaper one
for name, (module, shape) in {
    "2-D": (lambda: nn.Linear(7, 5), (6, 7)),
    "2-D without bias": (lambda: nn.Linear(7, 5, bias=False), (6, 7)),
    "3-D, T = 1": (lambda: nn.Linear(7, 5), (6, 1, 7)),
    "3-D, many positions": (lambda: nn.Linear(4, 3), (3, 70, 4)),
    "3-D, many positions without bias": (lambda: nn.Linear(4, 3, bias=False), (3, 70, 4)),
    "3-D, few positions": (lambda: nn.Linear(50, 40), (3, 2, 50)),
    "3-D, few positions without bias": (lambda: nn.Linear(50, 40, bias=False), (3, 2, 50)),
    "4-D": (lambda: nn.Linear(6, 5), (4, 3, 5, 6)),
    "5-D": (lambda: nn.Linear(3, 4), (3, 2, 3, 2, 3)),
    "one output": (lambda: nn.Linear(9, 1), (5, 9)),
    "one input": (lambda: nn.Linear(1, 4), (5, 3, 1)),
    "wide": (lambda: nn.Linear(300, 260), (9, 300)),
    "N = T = in = out": (lambda: nn.Linear(5, 5), (5, 5, 5)),
    "N = 1": (lambda: nn.Linear(7, 5), (1, 7)),
    "N = 1, 3-D": (lambda: nn.Linear(7, 5), (1, 4, 7)),
    "empty batch": (lambda: nn.Linear(7, 5), (0, 7)),
    "empty batch, 3-D": (lambda: nn.Linear(7, 5), (0, 4, 7)),
    "no positions": (lambda: nn.Linear(7, 5), (3, 0, 7)),
}.items():
    module_case("Linear", name, module, shape)

module_case("Linear", "the model itself", lambda: nn.Linear(7, 5), (6, 7), then=False)
module_case("Linear", "strided input", lambda: nn.Sequential(Transposed(), nn.Linear(7, 5)), (6, 7, 4))
module_case("Linear", "expanded input", lambda: nn.Sequential(Expanded(4), nn.Linear(7, 5)), (6, 1, 7))
module_case("Bilinear", "2-D", lambda: nn.Bilinear(4, 3, 5), (6, 4), (6, 3), then=False, expect=EITHER)
module_case("Bilinear", "3-D", lambda: nn.Bilinear(4, 3, 5), (6, 2, 4), (6, 2, 3), then=False, expect=EITHER)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Expanded(nn.Module):
    def __init__(self, positions: int):
        super().__init__()
        self.positions = positions

    def forward(self, x):
        return x.expand(-1, self.positions, -1)


CONVOLUTIONS = {
    "2-D": (lambda: nn.Conv2d(3, 5, 3, padding=1), (4, 3, 7, 6)),
    "2-D without bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), (4, 3, 7, 6)),
    "1 x 1": (lambda: nn.Conv2d(6, 5, 1), (4, 6, 4, 3)),
    "patches (stride = kernel)": (lambda: nn.Conv2d(3, 8, 4, stride=4), (4, 3, 8, 8)),
    "one output position": (lambda: nn.Conv2d(3, 8, 5), (4, 3, 5, 5)),
    "stride and dilation": (lambda: nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=2), (4, 3, 9, 8)),
    "stride that leaves a rest": (lambda: nn.Conv2d(3, 4, 3, stride=3), (4, 3, 10, 11)),
    "padding 'same', even kernel": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (4, 3, 7, 6)),
    "padding 'valid'": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (4, 3, 7, 6)),
    "unequal padding, stride, dilation": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 3)),
        (4, 3, 8, 7),
    ),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 6, 5)),
    "grouped, padding and stride": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1, stride=2), (4, 6, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 4, 6, 5)),
    "depthwise, multiplier 2": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 4, 6, 5)),
    "padding_mode reflect": (lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"), (4, 3, 7, 6)),
    "padding_mode circular": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (4, 3, 7, 6)),
    "padding_mode replicate": (lambda: nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="replicate"), (4, 3, 7, 6)),
    "padding_mode reflect, grouped": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", groups=2),
        (4, 4, 6, 5),
    ),
    "1-D, dilation and stride": (lambda: nn.Conv1d(4, 5, 3, dilation=2, stride=2), (4, 4, 15)),
    "1-D, causal by padding": (lambda: nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(4, 5, 5)), (4, 4, 9)),
    "1-D, grouped, circular": (
        lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="circular"),
        (4, 4, 9),
    ),
    "3-D": (lambda: nn.Conv3d(2, 4, 3, padding=1), (3, 2, 4, 5, 4)),
    "3-D, dilation, stride, grouped": (
        lambda: nn.Conv3d(4, 4, (1, 3, 2), dilation=(1, 2, 1), stride=(2, 1, 1), groups=2),
        (3, 4, 4, 6, 5),
    ),
    "3-D, depthwise": (lambda: nn.Conv3d(3, 3, 2, groups=3), (3, 3, 3, 4, 3)),
    "transposed 1-D": (lambda: nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1, output_padding=1), (4, 4, 6)),
    "transposed 2-D": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (4, 4, 4, 5)),
    "transposed 2-D, grouped": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=(1, 0), groups=2, bias=False),
        (4, 4, 4, 3),
    ),
    "transposed 2-D, depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, dilation=2), (4, 4, 4, 3)),
    "transposed 3-D, grouped": (
        lambda: nn.ConvTranspose3d(4, 2, 2, stride=2, output_padding=1, dilation=2, groups=2),
        (3, 4, 2, 3, 2),
    ),
    "N = 1": (lambda: nn.Conv2d(3, 5, 3, padding=1), (1, 3, 7, 6)),
    "empty batch": (lambda: nn.Conv2d(3, 5, 3, padding=1), (0, 3, 7, 6)),
    "N = channels = width": (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 4, 4, 4)),
}
for name, (module, shape) in CONVOLUTIONS.items():
    module_case("Convolution", name, module, shape)


@case("Convolution", "channels_last")
def channels_last():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, groups=1), nn.Tanh())
    model = model.to(memory_format=torch.channels_last)
    return Problem(model, (torch.randn(4, 3, 6, 5).to(memory_format=torch.channels_last),))


@case("Convolution", "channels_last, grouped, depthwise")
def channels_last_grouped():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 4, 3, groups=2, padding=1))
    model = model.to(memory_format=torch.channels_last)
    return Problem(model, (torch.randn(4, 4, 6, 5).to(memory_format=torch.channels_last),))


@case("Convolution", "autoencoder")
def autoencoder():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, 1),
        nn.GELU(),
        nn.ConvTranspose2d(6, 2, 4, stride=2, padding=1),
    )
    return Problem(model, (torch.randn(4, 2, 8, 8),))


@case("Convolution", "fold of patches (Unfold, Linear, Fold)")
def unfold_linear_fold():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            columns = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
            return nn.functional.fold(self.linear(columns).transpose(1, 2), (6, 4), 2, stride=2)

    return Problem(Patches(), (torch.randn(4, 2, 6, 4),))


class Lookup(nn.Module):
    """Ids [N, T] to vectors, and a linear layer on them."""

    def __init__(self, embedding: nn.Module, d: int = 6):
        super().__init__()
        self.embedding, self.linear = embedding, nn.Linear(d, 4)

    def forward(self, ids):
        return self.linear(self.embedding(ids).tanh())


def embedding_case(name: str, make, shape=(5, 8), **settings):
    def build():
        return Problem(Lookup(make()), (torch.randint(7, shape),))

    case("Embedding", name, **settings)(build)


def frequencies(model, inputs, shared):
    return (1.3 * model(*inputs) + 0.4).sin().flatten(1).sum(1)


embedding_case("plain, repeated ids", lambda: nn.Embedding(7, 6))
embedding_case("padding_idx", lambda: nn.Embedding(7, 6, padding_idx=2))
embedding_case("negative padding_idx", lambda: nn.Embedding(7, 6, padding_idx=-1))
embedding_case("one id a sample", lambda: nn.Embedding(7, 6), (5,))
embedding_case("3-D ids", lambda: nn.Embedding(7, 6), (5, 2, 3))
embedding_case("N = 1", lambda: nn.Embedding(7, 6), (1, 8))
embedding_case("empty batch", lambda: nn.Embedding(7, 6), (0, 8))
embedding_case("max_norm", lambda: nn.Embedding(7, 6, max_norm=1.0), expect=EITHER, message="max_norm")
embedding_case("sparse", lambda: nn.Embedding(7, 6, sparse=True), expect=EITHER)
embedding_case("many ids", lambda: nn.Embedding(300, 6), (4, 200))


@case("Embedding", "scale_grad_by_freq (frequencies of the batch)", EITHER, "scale_grad_by_freq")
def scale_grad_by_freq():
    model = Lookup(nn.Embedding(7, 6, scale_grad_by_freq=True))
    return Problem(model, (torch.randint(7, (5, 8)),), losses=frequencies)


@case("Embedding", "by indexing the weight", EITHER)
def indexed_weight():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 6))

        def forward(self, ids):
            return self.table[ids]

    return Problem(Indexed(), (torch.randint(7, (5, 8)),))


@case("Embedding", "one-hot times the weight")
def one_hot():
    class OneHot(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, 6))

        def forward(self, ids):
            return nn.functional.one_hot(ids, 7).to(self.table.dtype) @ self.table

    return Problem(OneHot(), (torch.randint(7, (5, 8)),))


for mode in ("sum", "mean", "max"):

    @case("Embedding", f"EmbeddingBag, 2-D, {mode}", EITHER)
    def embedding_bag(mode=mode):
        return Problem(nn.EmbeddingBag(7, 6, mode=mode), (torch.randint(7, (5, 4)),))


@case("Embedding", "EmbeddingBag with offsets", EITHER)
def embedding_bag_offsets():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(7, 6, mode="sum")

        def forward(self, ids):
            return self.bag(ids.reshape(-1), torch.arange(len(ids)) * ids.shape[1])

    return Problem(Bags(), (torch.randint(7, (5, 4)),))


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(6), (5, 4, 6)),
    "LayerNorm, 2-D": (lambda: nn.LayerNorm(6), (5, 6)),
    "LayerNorm over two dimensions": (lambda: nn.LayerNorm((4, 6)), (5, 4, 6)),
    "LayerNorm, bias=False": (lambda: nn.LayerNorm(6, bias=False), (5, 4, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(3, 6), (5, 6, 4, 3)),
    "GroupNorm, one group": (lambda: nn.GroupNorm(1, 6), (5, 6, 4, 3)),
    "GroupNorm, one group a channel": (lambda: nn.GroupNorm(6, 6), (5, 6, 7)),
    "GroupNorm, 2-D": (lambda: nn.GroupNorm(2, 6), (5, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (5, 4, 6)),
    "RMSNorm, eps": (lambda: nn.RMSNorm(6, eps=0.1), (5, 4, 6)),
    "RMSNorm over two dimensions": (lambda: nn.RMSNorm((4, 6)), (5, 4, 6)),
    "InstanceNorm1d, affine": (lambda: nn.InstanceNorm1d(6, affine=True), (5, 6, 7)),
    "InstanceNorm2d, affine": (lambda: nn.InstanceNorm2d(6, affine=True), (5, 6, 4, 3)),
    "InstanceNorm3d, affine": (lambda: nn.InstanceNorm3d(3, affine=True), (4, 3, 2, 3, 4)),
    "PReLU": (lambda: nn.PReLU(), (5, 6, 4)),
    "PReLU a channel": (lambda: nn.PReLU(6), (5, 6, 4)),
    "PReLU a channel, 2-D": (lambda: nn.PReLU(6), (5, 6)),
    "LayerNorm, N = 1": (lambda: nn.LayerNorm(6), (1, 4, 6)),
    "LayerNorm, empty batch": (lambda: nn.LayerNorm(6), (0, 4, 6)),
    "LayerNorm, N = T = d": (lambda: nn.LayerNorm(5), (5, 5, 5)),
    "GroupNorm, N = channels": (lambda: nn.GroupNorm(3, 6), (6, 6, 6)),
}
for name, (module, shape) in NORMS.items():
    module_case("Normalisation", name, module, shape)

# without parameters of their own, between layers that have some
for name, module in {
    "LayerNorm, elementwise_affine=False": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "RMSNorm, elementwise_affine=False": lambda: nn.RMSNorm(6, elementwise_affine=False),
}.items():

    @case("Normalisation", name)
    def plain_norm(module=module):
        return Problem(nn.Sequential(nn.Linear(4, 6), module(), nn.Linear(6, 3)), (torch.randn(5, 3, 4),))


for name, module in {
    "GroupNorm, affine=False": lambda: nn.GroupNorm(2, 6, affine=False),
    "InstanceNorm2d, affine=False": lambda: nn.InstanceNorm2d(6),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
}.items():

    @case("Normalisation", name)
    def plain_image_norm(module=module):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), module(), nn.Conv2d(6, 4, 1))
        return Problem(model, (torch.randn(4, 3, 5, 6),))


@case("Normalisation", "InstanceNorm2d with running statistics, eval", EITHER)
def instance_norm_eval():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh())
    model(torch.randn(8, 3, 4, 4))
    return Problem(model.eval(), (torch.randn(5, 3, 4, 4),))


@case("Normalisation", "LayerNorm and RMSNorm by hand")
def norms_by_hand():
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            centred = x - x.mean(-1, keepdim=True)
            normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            return self.scale * normed + self.shift

    return Problem(nn.Sequential(nn.Linear(6, 6), ByHand(), nn.Linear(6, 2)), (torch.randn(5, 4, 6),))


def batch_norm_model(train: bool, affine: bool = True):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4, affine=affine),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 5),
        nn.BatchNorm1d(5, affine=affine),
        nn.Linear(5, 3),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model(torch.randn(16, 3, 4, 4))
    return model.train(train)


@case("BatchNorm", "eval mode")
def batch_norm_eval():
    return Problem(batch_norm_model(train=False), (torch.randn(6, 3, 4, 4),))


@case("BatchNorm", "train mode", REFUSED, "BatchNorm")
def batch_norm_train():
    return Problem(batch_norm_model(train=True), (torch.randn(6, 3, 4, 4),))


@case("BatchNorm", "train mode, frozen", REFUSED, "BatchNorm")
def batch_norm_frozen():
    model = batch_norm_model(train=True)
    model[1].requires_grad_(False), model[5].requires_grad_(False)
    return Problem(model, (torch.randn(6, 3, 4, 4),))


@case("BatchNorm", "train mode, affine=False", REFUSED, "BatchNorm")
def batch_norm_plain():
    return Problem(batch_norm_model(train=True, affine=False), (torch.randn(6, 3, 4, 4),))


@case("BatchNorm", "train mode, its parameters not asked for", REFUSED, "BatchNorm")
def batch_norm_not_counted():
    model = batch_norm_model(train=True)
    return Problem(model, (torch.randn(6, 3, 4, 4),), options={"parameters": ["0.weight"]})


@case("BatchNorm", "track_running_stats=False, eval mode", REFUSED, "BatchNorm")
def batch_norm_without_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    return Problem(model, (torch.randn(6, 3),))


@case("BatchNorm", "F.batch_norm with batch statistics", REFUSED, "batch.?norm|BatchNorm")
def functional_batch_norm():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return nn.functional.batch_norm(self.linear(x), None, None, self.scale, None, training=True)

    return Problem(Functional(), (torch.randn(6, 3),))


def with_constant_statistics(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A copy in which each BatchNorm is in eval mode with the statistics that the batch gives it in train mode."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def remember(module, inputs):
                x = inputs[0].detach()
                over = [d for d in range(x.dim()) if d != 1]
                module.running_mean.copy_(x.mean(over))
                module.running_var.copy_(x.var(over, unbiased=False))
                module.eval()  # before it runs, so that the layers after it see the same values

            module.register_forward_pre_hook(remember)
    model.double()
    with torch.no_grad():
        model(x.double())
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return model


@case("BatchNorm", "train mode, batchnorm='fixed_statistics'")
def batch_norm_fixed():
    model, x = batch_norm_model(train=True), torch.randn(6, 3, 4, 4)
    oracle_model = with_constant_statistics(model, x)
    return Problem(model, (x,), options={"batchnorm": "fixed_statistics"}, oracle_model=oracle_model)


@case("BatchNorm", "train mode, affine=False, batchnorm='fixed_statistics'")
def batch_norm_fixed_plain():
    model, x = batch_norm_model(train=True, affine=False), torch.randn(6, 3, 4, 4)
    oracle_model = with_constant_statistics(model, x)
    return Problem(model, (x,), options={"batchnorm": "fixed_statistics"}, oracle_model=oracle_model)


# Reparametrized weights: the trainable tensor is not the one the layer multiplies by
REPARAMETRIZED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    "weight_norm, convolution": lambda: parametrizations.weight_norm(nn.Conv1d(6, 4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 4)),
}
for name, module in REPARAMETRIZED.items():
    module_case("Reparametrized", name, module, (5, 6, 6), expect=EITHER, message="original|weight_[gv]|weight")


@case("Reparametrized", "spectral_norm, eval mode", EITHER, "original|weight")
def spectral_norm():
    layer = parametrizations.spectral_norm(nn.Linear(6, 4))
    layer(torch.randn(3, 6))
    return Problem(nn.Sequential(layer, nn.Tanh()).eval(), (torch.randn(5, 6),))


@case("Reparametrized", "pruned", EITHER, "weight")
def pruned():
    layer = prune.random_unstructured(nn.Linear(6, 4), "weight", 0.5)
    return Problem(nn.Sequential(layer, nn.Tanh()), (torch.randn(5, 6),))


@case("Reparametrized", "weight standardisation", EITHER, "weight")
def weight_standardisation():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)

    return Problem(nn.Sequential(Standardised(3, 4, 3), nn.Tanh()), (torch.randn(5, 3, 5, 5),))
