"""On a GPU: a whole captured step of token selection, for every rule. Collected only where CUDA is available."""

import pytest
import torch

from adaselect_kernels import TokenSelector, selected_linear_cross_entropy
from adaselect_kernels.policies.tokens import RULES

CUDA = torch.device("cuda")
IGNORE = -100


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_captured_step_replays_as_eager_does(rule, per_sequence):
    """Also of the state: the noise and the method weights go on from replay to replay."""
    hidden = torch.randn(4, 33, 64, device=CUDA, requires_grad=True)
    weight = torch.randn(1000, 64, device=CUDA, requires_grad=True)
    targets = torch.randint(1000, (4, 33), device=CUDA)
    targets[1, 20:] = IGNORE
    given = {"reference": torch.rand(4, 33, device=CUDA)} if rule == "excess_loss" else {}
    replayed, eager = (TokenSelector(rule, 0.3, seed=3, per_sequence=per_sequence, device=CUDA) for _ in "ab")

    def step(selector):
        chosen = selector.select(hidden, weight, targets, **given)
        loss = selected_linear_cross_entropy(hidden, weight, targets, chosen.indices)
        return loss, chosen.mask, chosen.indices, chosen.n_selected, *torch.autograd.grad(loss, (hidden, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up: compiles, allocates the workspaces
        for _ in range(3):
            step(replayed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(replayed)
    eager.load_state_dict(replayed.state_dict())
    for i in range(20):
        with torch.no_grad():
            hidden.mul_(0.9).add_(0.01)
        if i == 10:
            targets[2] = IGNORE  # another number of valid tokens, the same shapes
        graph.replay()
        assert all(map(torch.equal, results, step(eager))), i
    assert int(results[3]) == int(results[1].sum()) < results[2].shape[0]
    assert torch.equal(replayed.state.buffer.nan_to_num(), eager.state.buffer.nan_to_num())


@pytest.mark.parametrize("rule", RULES)
def test_nothing_synchronises_the_host(rule):
    hidden, weight = torch.randn(2, 50, 32, device=CUDA), torch.randn(500, 32, device=CUDA)
    targets = torch.randint(500, (2, 50), device=CUDA)
    given = {"reference": torch.rand(2, 50, device=CUDA)} if rule == "excess_loss" else {}
    selector = TokenSelector(rule, 0.3, device=CUDA)
    selector.select(hidden, weight, targets, **given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        selector.select(hidden, weight, targets, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
