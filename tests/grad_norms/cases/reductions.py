"""Losses and their reductions."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.grad_norms.cases.attention import GPT
from tests.grad_norms.cases.parameters import small
from tests.grad_norms.problem import EITHER, REFUSED, Problem, case, wave

IGNORE = -100


def classified(reduction="sum", **options):
    """(model, (x, y)) -> cross-entropy over the last dimension."""

    def loss(model, inputs, shared):
        return F.cross_entropy(model(inputs[0]).flatten(0, -2), inputs[1].flatten(), reduction=reduction, **options)

    return loss


def token_batch(ignored: bool):
    x, y = torch.randn(5, 4, 6), torch.randint(3, (5, 4))
    if ignored:
        y[0, 1:], y[2], y[4, 0] = IGNORE, IGNORE, IGNORE
    return x, y


@case("Loss", "mean over the samples of given losses")
def mean_of_losses():
    def mean(model, inputs, shared):
        return F.cross_entropy(model(inputs[0]), inputs[1], reduction="none").mean()

    return mean_problem((torch.randn(5, 6), torch.randint(3, (5,))), mean)


def mean_problem(inputs, mean, reduction="mean", loss=None, model=None) -> Problem:
    """The norms of the loss sum from the gradients of a mean."""
    options = {"loss_reduction": reduction}
    return Problem(model or small(), inputs, loss=loss or classified(), inside=mean, options=options)


@case("Loss", "mean cross_entropy, [N, C]")
def mean_samples():
    return mean_problem((torch.randn(5, 6), torch.randint(3, (5,))), classified("mean"))


@case("Loss", "mean cross_entropy, tokens")
def mean_tokens():
    return mean_problem(token_batch(False), classified("mean"))


@case("Loss", "mean cross_entropy, ignored tokens")
def mean_ignored():
    return mean_problem(token_batch(True), classified("mean"))


@case("Loss", "mean cross_entropy, ignored samples, [N, C]")
def mean_ignored_samples():
    y = torch.randint(3, (6,))
    y[1], y[4] = IGNORE, IGNORE
    return mean_problem((torch.randn(6, 6), y), classified("mean"))


@case("Loss", "mean cross_entropy, another ignore_index")
def mean_other_ignored():
    y = torch.tensor([[0, 1, 2, 1], [1, 1, 1, 0], [2, 2, 1, 0]])
    return mean_problem((torch.randn(3, 4, 6), y), classified("mean", ignore_index=1), loss=classified(ignore_index=1))


@case("Loss", "mean cross_entropy as a module, ignored tokens")
def mean_module():
    criterion = nn.CrossEntropyLoss()

    def mean(model, inputs, shared):
        return criterion(model(inputs[0]).transpose(1, 2), inputs[1])

    return mean_problem(token_batch(True), mean)


@case("Loss", "mean cross_entropy, label smoothing")
def mean_smoothed():
    return mean_problem(
        token_batch(True), classified("mean", label_smoothing=0.1), loss=classified(label_smoothing=0.1)
    )


@case("Loss", "mean cross_entropy, class probabilities", EITHER)
def mean_probabilities():
    def loss(reduction):
        return lambda model, inputs, shared: F.cross_entropy(model(inputs[0]), inputs[1], reduction=reduction)

    return mean_problem((torch.randn(5, 6), torch.rand(5, 3).softmax(1)), loss("mean"), loss=loss("sum"))


@case("Loss", "mean cross_entropy, class weights (divides by their sum)", EITHER)
def mean_weighted():
    weight = torch.tensor([0.5, 2.0, 1.0])

    def loss(reduction):
        def run(model, inputs, shared):
            logits = model(inputs[0])
            return F.cross_entropy(logits, inputs[1], weight.to(logits), reduction=reduction)

        return run

    return mean_problem((torch.randn(5, 6), torch.randint(3, (5,))), loss("mean"), loss=loss("sum"))


@case("Loss", "mean nll_loss, ignored tokens")
def mean_nll():
    def loss(reduction):
        def run(model, inputs, shared):
            logs = model(inputs[0]).log_softmax(-1)
            return F.nll_loss(logs.flatten(0, 1), inputs[1].flatten(), reduction=reduction)

        return run

    return mean_problem(token_batch(True), loss("mean"), loss=loss("sum"))


@case("Loss", "mean next-token loss of a GPT")
def mean_gpt():
    def loss(reduction):
        def run(model, inputs, shared):
            (ids,) = inputs
            targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, IGNORE)
            return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), targets.flatten(), reduction=reduction)

        return run

    return mean_problem((torch.randint(13, (5, 6)),), loss("mean"), loss=loss("sum"), model=GPT())


@case("Loss", "mse_loss, mean over all elements (a sample's loss is the mean over its own)")
def mean_mse():
    def loss(model, inputs, shared):
        return F.mse_loss(model(inputs[0]), inputs[1], reduction="sum") / inputs[1][0].numel()

    def mean(model, inputs, shared):
        return F.mse_loss(model(inputs[0]), inputs[1])

    return mean_problem((torch.randn(5, 4, 6), torch.randn(5, 4, 3)), mean, loss=loss)


@case("Loss", "a divisor given as a number")
def given_divisor():
    def mean(model, inputs, shared):
        return classified()(model, inputs, shared) / 7.5

    return mean_problem(token_batch(True), mean, reduction=7.5)


@case("Loss", "sum of two mean losses over the samples", EITHER)
def two_means():
    def loss(reduction, elements):
        def run(model, inputs, shared):
            logits = model(inputs[0])
            square = F.mse_loss(logits, torch.zeros_like(logits), reduction=reduction)
            return F.cross_entropy(logits, inputs[1], reduction=reduction) + square / elements

        return run

    return mean_problem((torch.randn(5, 6), torch.randint(3, (5,))), loss("mean", 1), loss=loss("sum", 3))


@case("Loss", "sum of two cross-entropies that ignore other targets", REFUSED)
def two_counts():
    def mean(model, inputs, shared):
        logits = model(inputs[0])
        return F.cross_entropy(logits, inputs[1]) + F.cross_entropy(logits, inputs[1], ignore_index=1)

    return mean_problem((torch.randn(5, 6), torch.tensor([0, 1, 2, 1, 0])), mean)


@case("Loss", "mean cross_entropy over N times T with a mean over N added", REFUSED)
def tokens_and_samples():
    def mean(model, inputs, shared):
        logits = model(inputs[0])
        return classified("mean")(model, inputs, shared) + logits.sin().sum((1, 2)).mean()

    return mean_problem(token_batch(False), mean)


@case("Loss", "scaled sum, as a GradScaler does (the norms are of what is differentiated)")
def scaled():
    return Problem(small(), (torch.randn(5, 6),), loss=lambda model, inputs, shared: 64.0 * wave(model(*inputs)))


@case("Loss", "an unknown reduction", REFUSED, "loss_reduction|reduction")
def unknown_reduction():
    return Problem(small(), (torch.randn(5, 6),), options={"loss_reduction": "average"})
