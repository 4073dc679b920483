"""On a GPU: the gradients of selected losses, the masks, and a whole captured step. Collected only where CUDA is available."""

import pytest
import torch
import torch.nn.functional as F

from adaselect_kernels import (
    dispatch,
    fused_linear_select,
    linear_per_sample_stats,
    mask_to_indices,
    reference,
    select_mask,
    selected_cross_entropy,
    selected_linear_cross_entropy,
)
from adaselect_kernels.checks import selected_count
from adaselect_kernels.kernels import losses
from tests.oracle import assert_within_budget

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {"label_smoothing": 0.1, "softcap": 20.0, "z_loss": 1e-3}


def total(z, targets, weight, label_smoothing=0.0, softcap=0.0, z_loss=0.0):
    z = softcap * (z / softcap).tanh() if softcap > 0 else z
    each = F.cross_entropy(z, targets, reduction="none", label_smoothing=label_smoothing)
    return (weight.to(each.dtype) * (each + z_loss * z.logsumexp(1).square())).sum()


def assert_right(got, oracle, peer, what):
    """Within PyTorch's own error; of float64, whose oracle is no more exact than it, within a few roundings."""
    if got.dtype == torch.float64:
        peer = oracle + 8 * torch.finfo(torch.float64).eps * oracle.abs().max()
    assert_within_budget(got, oracle, peer, what)


def rows(n, classes, dtype, share=0.5):
    """Weights, of which `share` are not 0, and targets."""
    weight = torch.rand(n, device=CUDA, dtype=reference.compute_dtype(dtype)) + 0.5
    return weight * (torch.rand(n, device=CUDA) < share), torch.randint(classes, (n,), device=CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "classes"),
    [
        (1, 1),
        (1_000_003, 10),  # short rows, and a program that is cut
        (4096, 1000),
        (301, 5003),  # rows off the boundary
        (301, 32_000),
        (17, 128_256),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "misaligned"])
def test_gradients_of_logits(n, classes, dtype, layout):
    logits = (torch.randn(n, classes, device=CUDA) * 3).to(dtype)
    weight, targets = rows(n, classes, dtype)
    oracle_logits = logits.double()
    lse = 20 * (oracle_logits / 20).tanh()
    lse = lse.logsumexp(1)
    oracle = reference.cross_entropy_backward(weight.double(), oracle_logits, targets, lse, 0.1, 20.0, 1e-3)
    peer = logits.clone().requires_grad_()
    total(peer, targets, weight, **OPTIONS).backward()
    logits[weight == 0] = torch.nan
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    if layout == "misaligned":
        wide = torch.full((n, classes + 3), torch.nan, device=CUDA, dtype=dtype)
        wide[:, 1 : classes + 1] = logits
        logits = wide[:, 1 : classes + 1]
    operators = dispatch.resolve("triton", CUDA)
    got = operators.cross_entropy_backward(weight, logits, targets, lse.to(weight.dtype), 0.1, 20.0, 1e-3)
    assert_right(got, oracle, peer.grad, "gradient")
    assert (got[weight == 0] == 0).all()


def test_more_than_two_to_the_31_logits():
    n, classes = 17_000, 131_072  # 2.2e9 elements
    logits = torch.randn(n, classes, device=CUDA, dtype=torch.bfloat16)
    weight, targets = rows(n, classes, torch.bfloat16)
    operators = dispatch.resolve("triton", CUDA)
    lse = operators.per_sample_stats(logits, targets, [1], "sample", -100, 0.0)[0]
    got = operators.cross_entropy_backward(weight, logits, targets, lse, 0.0, 0.0, 0.0)
    for here in (slice(0, 50), slice(16_350, 16_420), slice(n - 50, n)):  # row 16,384 starts at 2^31
        z = logits[here].double()
        oracle = reference.cross_entropy_backward(
            weight[here].double(), z, targets[here], z.logsumexp(1), 0.0, 0.0, 0.0
        )
        peer = logits[here].clone().requires_grad_()
        total(peer, targets[here], weight[here]).backward()
        assert_within_budget(got[here], oracle, peer.grad, "gradient")


@pytest.mark.parametrize("classes", [500, 5003])
def test_large_offsets_keep_their_digits(classes):
    logits = torch.randn(64, classes, device=CUDA) * 3 + 1e4
    targets = torch.randint(classes, (64,), device=CUDA)
    mine, peer, oracle = (
        logits.to(t, copy=True).requires_grad_() for t in (torch.float32, torch.float32, torch.float64)
    )
    selected_cross_entropy(mine, targets, torch.arange(64, device=CUDA), reduction="sum").backward()
    for z in (peer, oracle):
        F.cross_entropy(z, targets, reduction="sum").backward()
    assert_within_budget(mine.grad, oracle.grad, peer.grad, "gradient")


def model(n, features, classes, dtype):
    """Hidden states, classifier and bias whose logits are a few units wide."""
    hidden = torch.randn(n, features, device=CUDA).to(dtype)
    weight = (torch.randn(classes, features, device=CUDA) * 3 / features**0.5).to(dtype)
    return hidden, weight, torch.randn(classes, device=CUDA).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "features", "classes", "block_bytes"),
    [
        (1, 16, 3, None),  # nothing is a multiple of anything
        (300, 256, 5003, 1 << 20),  # several blocks of rows and of classes
        (1000, 1024, 32_000, None),
    ],
    ids=str,
)
def test_gradients_of_a_classifier(monkeypatch, n, features, classes, block_bytes, dtype):
    if block_bytes is not None:
        monkeypatch.setattr(losses, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(losses, "LEAST_CLASSES", 1024)
    tensors = model(n, features, classes, dtype)
    weight, targets = rows(n, classes, dtype, 0.9)
    double = [t.double() for t in tensors]
    lse = reference.linear_logits(*double, 20.0, 0.5).logsumexp(1)
    rest = (0, classes, 0.1, 20.0, 0.5, 1e-3, [True] * 3)
    oracle = reference.linear_loss_backward(weight.double(), *double[:2], targets, lse, double[2], *rest)
    operators = dispatch.resolve("triton", CUDA)
    hidden = tensors[0].masked_fill((weight == 0)[:, None], torch.nan)
    got = operators.linear_loss_backward(weight, hidden, tensors[1], targets, lse.to(weight.dtype), tensors[2], *rest)
    peers = [t.clone().requires_grad_() for t in tensors]
    total(0.5 * F.linear(*peers), targets, weight, **OPTIONS).backward()
    for name, mine, right, peer in zip(("rows", "weight", "bias"), got, oracle, peers, strict=True):
        assert_right(mine, right, peer.grad, name)
    again = operators.linear_loss_backward(weight, hidden, tensors[1], targets, lse.to(weight.dtype), tensors[2], *rest)
    assert all(map(torch.equal, got, again)), "not the same bits"


def test_a_classifier_takes_a_block_of_memory():
    n, features, classes = 8192, 1024, 128_256  # the logits would take 4.2 GB in float32
    hidden, weight, _ = (t.requires_grad_() for t in model(n, features, classes, torch.bfloat16))
    targets = torch.randint(classes, (n,), device=CUDA)
    indices = torch.arange(n, device=CUDA)

    def step():
        selected_linear_cross_entropy(hidden, weight, targets, indices).backward()
        hidden.grad = weight.grad = None

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = weight.numel() * 2 + hidden.numel() * (4 + 2)
    # the block and its gradient of the half type; the chosen rows, once more where their weight is not 0; and a little
    assert extra <= gradients + losses.BLOCK_BYTES * 3 // 2 + 3 * hidden.numel() * 2 + (64 << 20)


def test_tf32_is_as_torch_has_it():
    hidden, weight, _ = model(256, 512, 4096, torch.float32)
    row_weight, targets = rows(256, 4096, torch.float32, 1.0)
    lse = (hidden @ weight.T).logsumexp(1)
    operators = dispatch.resolve("triton", CUDA)

    def gradient():
        return operators.linear_loss_backward(
            row_weight, hidden, weight, targets, lse, None, 0, 4096, 0.0, 0.0, 1.0, 0.0, [True, True, False]
        )

    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        exact = gradient()
        with torch.autocast("cuda", torch.bfloat16):
            assert all(map(torch.equal, exact, gradient())), "autocast has changed the products"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 4096), (1, 4097), (64, 2048), (8, 65_536), (3, 65_537), (1, 1_000_003), (1, 16_000_000)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["normal", "ties", "padded", "none"])
def test_masks_equal_the_reference(shape, dtype, kind):
    scores = torch.randn(shape, device=CUDA)
    if kind == "ties":
        scores = scores.round()
    scores = scores.to(dtype)
    if kind == "padded":
        scores[torch.rand(shape, device=CUDA) < 0.4] = -torch.inf
        scores[torch.rand(shape, device=CUDA) < 0.1] = torch.nan
        scores[torch.rand(shape, device=CUDA) < 0.1] = torch.inf
    if kind == "none":
        scores.fill_(torch.nan)
    for gamma in (0.1, 0.5, 1.0):
        assert torch.equal(select_mask(scores, gamma, per_sequence=True), reference.select_mask(scores, gamma)), gamma


class Step:
    """Score, choose a share of the valid tokens, the loss of those, its gradients: nothing but tensors of fixed shapes."""

    def __init__(self, n=4096, features=256, classes=8000, gamma=0.3, dtype=torch.bfloat16):
        torch.manual_seed(3)
        self.gamma, self.k = gamma, selected_count(gamma, n)
        self.hidden, self.weight, self.bias = (t.requires_grad_() for t in model(n, features, classes, dtype))
        self.targets = torch.randint(classes, (n,), device=CUDA)
        self.targets[::9] = -100

    def __call__(self):
        with torch.no_grad():
            scores = linear_per_sample_stats(
                self.hidden, self.weight, self.targets, bias=self.bias, stats=("loss",)
            ).loss
            scores = scores.masked_fill(self.targets == -100, -torch.inf)
            indices = mask_to_indices(select_mask(scores, self.gamma), self.k)
        loss = selected_linear_cross_entropy(
            self.hidden,
            self.weight,
            self.targets,
            indices,
            bias=self.bias,
            softcap=30.0,
            label_smoothing=0.1,
            z_loss=1e-4,
        )
        return loss, indices, *torch.autograd.grad(loss, (self.hidden, self.weight, self.bias))


def captured(call):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up: compiles, allocates the workspaces
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_a_captured_step_replays_a_thousand_times_as_eager_does():
    step = Step()
    graph, results = captured(step)
    for i in range(1000):
        with torch.no_grad():
            step.hidden.mul_(0.999).add_(0.001)
        graph.replay()
        if i % 50 == 0 or i > 990:
            assert all(map(torch.equal, results, step())), i


def test_a_captured_loss_of_stored_logits_replays_as_eager_does():
    logits = torch.randn(2048, 32_000, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(32_000, (2048,), device=CUDA)

    def step():
        with torch.no_grad():
            indices = mask_to_indices(select_mask(logits.amax(1), 0.2), selected_count(0.2, 2048))
        loss = selected_cross_entropy(logits, targets, indices, label_smoothing=0.1)
        return loss, indices, *torch.autograd.grad(loss, logits)

    graph, results = captured(step)
    for _ in range(20):
        with torch.no_grad():
            logits.mul_(0.99)
        graph.replay()
        assert all(map(torch.equal, results, step()))


def test_nothing_synchronises_the_host():
    step = Step()
    logits = torch.randn(512, 1000, device=CUDA, requires_grad=True)
    targets = torch.randint(1000, (512,), device=CUDA)

    def everything():
        step()
        chosen = fused_linear_select(step.hidden, step.weight, step.targets, 0.2).indices
        selected_linear_cross_entropy(step.hidden, step.weight, step.targets, chosen).backward()
        for reduction in ("mean", "sum"):
            selected_cross_entropy(logits, targets, chosen[:50] % 512, reduction=reduction).backward()
        select_mask(torch.randn(100_000, device=CUDA), 0.2)

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeats_are_bit_identical():
    step = Step(gamma=1.0)
    first = step()
    for _ in range(20):
        assert all(map(torch.equal, first, step()))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_equals_the_eager_one(mode):
    step = Step()

    def loss_of(hidden, weight, bias):
        with torch.no_grad():
            scores = linear_per_sample_stats(hidden, weight, step.targets, bias=bias, stats=("loss",)).loss
            scores = scores.masked_fill(step.targets == -100, -torch.inf)
            indices = mask_to_indices(select_mask(scores, 0.3), step.k)
        return selected_linear_cross_entropy(hidden, weight, step.targets, indices, bias=bias)

    def run(function):
        leaves = [t.detach().clone().requires_grad_() for t in (step.hidden, step.weight, step.bias)]
        loss = function(*leaves)
        loss.backward()
        return [loss.detach().clone(), *[leaf.grad.clone() for leaf in leaves]]

    compiled = torch.compile(loss_of, fullgraph=True, mode=mode)
    for _ in range(3):
        for mine, right in zip(run(compiled), run(loss_of), strict=True):
            torch.testing.assert_close(mine, right)


def test_accumulation_and_checkpointing_give_the_same_gradients():
    step = Step(n=512)
    indices = torch.arange(0, 512, 3, device=CUDA)

    def loss(hidden):
        return selected_linear_cross_entropy(hidden, step.weight, step.targets, indices, reduction="sum")

    right = torch.autograd.grad(loss(step.hidden), (step.hidden, step.weight))
    kept = torch.utils.checkpoint.checkpoint(loss, step.hidden, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(kept, (step.hidden, step.weight)), right))
    for _ in range(2):
        loss(step.hidden).backward()
    torch.testing.assert_close(step.hidden.grad, 2 * right[0])
    torch.testing.assert_close(step.weight.grad, 2 * right[1])


def test_a_bad_target_is_loud_and_reads_nothing_outside():
    hidden, weight, _ = (t.requires_grad_() for t in model(64, 32, 1000, torch.float32))
    targets = torch.randint(1000, (64,), device=CUDA)
    targets[3] = 1000
    each = selected_linear_cross_entropy(hidden, weight, targets, torch.arange(64, device=CUDA), reduction="none")
    assert each.isnan().nonzero().flatten().tolist() == [3]
    (gradient,) = torch.autograd.grad(each.sum(), hidden)
    assert gradient[3].isnan().all()
    assert gradient[torch.arange(64, device=CUDA) != 3].isfinite().all()
