"""The small GPT: shapes, causality, the tied head's gradient, refusals."""

import pytest
import torch
import torch.nn.functional as F

from adaselect_kernels import TokenSelector, selected_linear_cross_entropy
from adaselect_kernels.models import GPT

SIZES = {"vocabulary": 23, "context": 7, "width": 12, "layers": 2, "heads": 3}


def model_and_tokens(generator, **sizes):
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    return GPT(**(SIZES | sizes)).double(), torch.randint(23, (2, 7), generator=generator)


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_and_parameters(tied, generator):
    model, tokens = model_and_tokens(generator, tied=tied)
    hidden = model(tokens)
    assert hidden.shape == (2, 7, 12)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.head.T)
    assert (model.head is model.embedding.weight) == tied
    block = 12 * 12**2 + 13 * 12  # qkv 3, out 1, MLP 8 times width^2; biases 3 + 1 + 4 + 1, two norms 4
    assert sum(p.numel() for p in model.parameters()) == (1 if tied else 2) * 23 * 12 + 7 * 12 + 2 * block + 2 * 12
    assert model(tokens[:, :3]).shape == (2, 3, 12)


def test_what_writes_into_the_residual_stream_starts_smaller():
    model = GPT(vocabulary=64, context=64, width=64, layers=8, heads=2, tied=False)
    for name, std in (("attention.out", 0.005), ("shrink", 0.005), ("grow", 0.02), ("attention.qkv", 0.02)):
        weight = model.get_parameter(f"blocks.0.{name}.weight")
        assert abs(weight.std().item() / std - 1) < 0.1
    assert abs(model.head.std().item() / 0.02 - 1) < 0.1


def test_a_token_sees_itself_and_what_came_before(generator):
    model, tokens = model_and_tokens(generator)
    for place in (0, 3, 6):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 23
        changed = (model(tokens) != model(other)).any(-1)
        assert not changed[:, :place].any()
        assert changed[:, place:].all()


def test_the_order_of_tokens_matters(generator):
    model, _ = model_and_tokens(generator)
    same = torch.full((1, 7), 5)
    assert not torch.allclose(model(same)[0, 0], model(same)[0, 6])


def test_a_tied_head_has_the_gradients_of_both_its_uses(generator):
    tied, tokens = model_and_tokens(generator)
    untied = GPT(**SIZES, tied=False).double()
    untied.load_state_dict(tied.state_dict() | {"own_head": tied.embedding.weight.detach().clone()})
    targets = torch.randint(23, (2, 7), generator=generator)
    for model in (tied, untied):
        F.cross_entropy(model.logits(model(tokens)).flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(tied.embedding.weight.grad, untied.embedding.weight.grad + untied.own_head.grad)
    expected = tied.embedding.weight.grad.clone()
    tied.zero_grad()
    hidden = tied(tokens)
    chosen = TokenSelector("loss", gamma=1.0, impl="reference").select(hidden, tied.head, targets)
    selected_linear_cross_entropy(hidden, tied.head, targets, chosen.indices, impl="reference").backward()
    torch.testing.assert_close(tied.embedding.weight.grad, expected)


def test_what_is_refused():
    for error, message, sizes in (
        (ValueError, "layers must be at least 1, got 0", {"layers": 0}),
        (TypeError, "width must be an int, got 2.0", {"width": 2.0}),
        (ValueError, "width must be a multiple of heads, got 12 and 5", {"heads": 5}),
    ):
        with pytest.raises(error, match=message):
            GPT(**(SIZES | sizes))
    with pytest.raises(ValueError, match=r"T in \[1, 7\], got shape \(1, 8\)"):
        GPT(**SIZES)(torch.zeros(1, 8, dtype=torch.int64))
