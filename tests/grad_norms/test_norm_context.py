"""The context leaves everything as it was: the model, its gradients, torch's modes, whatever happens inside."""

import contextlib
import copy
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from adaselect_kernels import PerSampleGradNorm
from benchmarks.timing import extra_bytes
from tests.grad_norms.cases.attention import GPT, next_token
from tests.grad_norms.cases.layers import batch_norm_model
from tests.grad_norms.cases.parameters import small
from tests.grad_norms.problem import wave

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") or name.endswith("_with_kwargs")]


@pytest.fixture(autouse=True)
def fresh_stream(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
        yield


def one_backward_a_sample(model: nn.Module, x: torch.Tensor, loss=wave) -> torch.Tensor:
    """[N] float64."""
    model = copy.deepcopy(model).double()
    norms = []
    for sample in x.split(1):
        model.zero_grad()
        loss(model(sample.double() if x.is_floating_point() else sample)).backward()
        norms.append(sum((p.grad.square().sum() for p in model.parameters() if p.grad is not None), torch.zeros(())))
    return torch.stack(norms).double().sqrt()


def assert_norms(norms: PerSampleGradNorm, expected: torch.Tensor) -> None:
    error = (norms.total().double() - expected).abs() / expected
    assert error.max() <= 2e-6, f"relative errors {error}"


def traces(model: nn.Module) -> dict:
    """Everything of a model that a context could leave something in."""
    modules = {
        name: (type(m), sorted(vars(m)), [len(getattr(m, hooks)) for hooks in HOOKS], m.training, m.forward.__func__)
        for name, m in model.named_modules()
    }
    parameters = {
        name: (id(p), type(p), p.requires_grad, sorted(vars(p)), p._version, *hooks_of(p))
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    return {"modules": modules, "parameters": parameters, "state": list(model.state_dict())}


def hooks_of(tensor: torch.Tensor) -> tuple[int, int]:
    return len(tensor._backward_hooks or ()), len(tensor._post_accumulate_grad_hooks or ())


def torch_modes() -> dict:
    """What of torch itself a context could leave switched or replaced."""
    module = nn.modules.module
    return {
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "grad": torch.is_grad_enabled(),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "global hooks": [len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks") and hooks],
        "functions": (
            F.linear,
            F.embedding,
            F.conv2d,
            nn.Linear.forward,
            torch.Tensor.backward,
            torch.autograd.backward,
        ),
    }


def refuses(run) -> None:
    """No number comes out of run(): it raises before."""
    with pytest.raises((ValueError, RuntimeError)):
        run()


class TestNothingIsLeft:
    @pytest.mark.parametrize("mode", ["plain", "fused", "none"])
    def test_after_a_run(self, mode):
        model, ids = GPT(), torch.randint(13, (5, 6))
        state = copy.deepcopy(model.state_dict())
        before, modes = traces(model), torch_modes()
        with PerSampleGradNorm(model, weight_gradients=mode) as norms:
            next_token(model, (ids,), ()).backward()
        norms.total()
        assert traces(model) == before
        assert torch_modes() == modes
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
        model.zero_grad(set_to_none=True)
        pickle.loads(pickle.dumps(model))
        copy.deepcopy(model)

    def test_a_later_backward_is_a_plain_one(self):
        model, x = small(), torch.randn(5, 6)
        twin = copy.deepcopy(model)
        with PerSampleGradNorm(model) as norms:
            wave(model(x)).backward()
        before = norms.total().clone()
        wave(model(2 * x)).backward()
        wave(twin(x)).backward()
        wave(twin(2 * x)).backward()
        assert torch.equal(norms.total(), before)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

    def test_batch_norm_statistics_advance_as_without(self):
        model, x = batch_norm_model(train=True), torch.randn(6, 3, 4, 4)
        twin = copy.deepcopy(model)
        with PerSampleGradNorm(model, batchnorm="fixed_statistics"):
            wave(model(x)).backward()
        wave(twin(x)).backward()
        for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name

    @pytest.mark.parametrize("where", ["before the model", "in the model", "in the loss", "in the backward"])
    def test_after_an_exception(self, where):
        class Stop(Exception):
            pass

        def stop(*args):
            raise Stop

        model, x = small(), torch.randn(5, 6)
        before, modes = traces(model), torch_modes()
        norms = PerSampleGradNorm(model)

        def run():
            with norms:
                if where == "before the model":
                    stop()
                if where == "in the model":
                    model[1].forward = stop
                out = model(x)
                if where == "in the loss":
                    stop()
                out.register_hook(stop)
                wave(out).backward()

        with pytest.raises(Stop):
            run()
        vars(model[1]).pop("forward", None)
        assert traces(model) == before
        assert torch_modes() == modes
        with pytest.raises((ValueError, RuntimeError)):
            norms.total()
        with PerSampleGradNorm(model) as norms:
            wave(model(x)).backward()
        assert_norms(norms, one_backward_a_sample(model, x))

    def test_after_a_refusal(self):
        model, x = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.randn(5, 6)
        before, modes = traces(model), torch_modes()
        with pytest.raises(ValueError, match="BatchNorm"), PerSampleGradNorm(model):
            wave(model(x)).backward()
        after = traces(model)
        assert after["modules"] == before["modules"]
        assert torch_modes() == modes
        model.eval()
        with PerSampleGradNorm(model) as norms:
            wave(model(x)).backward()
        assert_norms(norms, one_backward_a_sample(model, x))

    def test_the_random_stream_is_not_drawn_from(self):
        model, x = small(), torch.randn(5, 6)
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        with PerSampleGradNorm(model) as norms:
            wave(model(x)).backward()
        norms.total()
        assert torch.equal(torch.rand(4), expected)


class TestUse:
    def test_the_input_gets_its_gradient(self):
        model, x = small(), torch.randn(5, 4, 6)
        ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        with PerSampleGradNorm(model):
            wave(model(ours)).backward()
        wave(model(plain)).backward()
        assert torch.equal(ours.grad, plain.grad)

    def test_scoring_leaves_gradients_that_are_there(self):
        model, x = small(), torch.randn(5, 6)
        kept = {name: torch.randn_like(p) for name, p in model.named_parameters() if name != "0.bias"}
        for name, p in model.named_parameters():
            p.grad = kept.get(name, torch.zeros(0)).clone() if name in kept else None
        with PerSampleGradNorm(model, weight_gradients="none") as norms:
            wave(model(x)).backward()
        assert model[0].bias.grad is None
        assert all(torch.equal(dict(model.named_parameters())[name].grad, value) for name, value in kept.items())
        assert all(p.requires_grad for p in model.parameters())
        assert_norms(norms, one_backward_a_sample(model, x))

    @pytest.mark.parametrize("mode", ["plain", "fused"])
    def test_gradients_accumulate(self, mode):
        model = small()
        twin = copy.deepcopy(model)
        for n in (5, 3, 1):  # the batch changes its size
            x = torch.randn(n, 4, 6)
            with PerSampleGradNorm(model, weight_gradients=mode) as norms:
                wave(model(x)).backward()
            wave(twin(x)).backward()
            assert_norms(norms, one_backward_a_sample(model, x))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert (p.grad - q.grad).abs().max() <= (0 if mode == "plain" else 1e-5 * q.grad.abs().max())

    def test_two_backward_passes_in_one_context(self):
        """Norms of the last forward and backward; .grad accumulates."""
        model, first, last = small(), torch.randn(5, 6), torch.randn(4, 6)
        twin = copy.deepcopy(model)
        with PerSampleGradNorm(model) as norms:
            wave(model(first)).backward()
            wave(model(last)).backward()
        wave(twin(first)).backward()
        wave(twin(last)).backward()
        assert_norms(norms, one_backward_a_sample(model, last))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))

    def test_read_inside_the_context(self):
        model, x = small(), torch.randn(5, 6)
        with PerSampleGradNorm(model) as norms:
            wave(model(x)).backward()
            inside = norms.total().clone()
        assert torch.equal(inside, norms.total())
        assert torch.equal(norms.total(), norms.total())

    def test_used_again(self):
        """One object, entered for every batch."""
        model = small()
        norms = PerSampleGradNorm(model)
        for n in (5, 2):
            x = torch.randn(n, 6)
            with norms:
                wave(model(x)).backward()
            assert_norms(norms, one_backward_a_sample(model, x))

    def test_the_optimizer_may_step_inside(self):
        model, x = small(), torch.randn(5, 6)
        expected = one_backward_a_sample(model, x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with PerSampleGradNorm(model) as norms:
            wave(model(x)).backward()
            optimizer.step()
        assert_norms(norms, expected)

    def test_clipping_and_zeroing_inside(self):
        model, x = small(), torch.randn(5, 6)
        with PerSampleGradNorm(model) as norms:
            wave(model(x)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            model.zero_grad()
        assert_norms(norms, one_backward_a_sample(model, x))

    def test_forward_without_gradients_inside(self):
        """A validation batch of another size between forward and backward changes nothing."""
        model, x = small(), torch.randn(5, 6)
        with PerSampleGradNorm(model) as norms:
            loss = wave(model(x))
            with torch.no_grad():
                model(torch.randn(9, 6))
            loss.backward()
        assert_norms(norms, one_backward_a_sample(model, x))

    def test_nested_on_two_models(self):
        one, two, x = small(), small(), torch.randn(5, 6)
        with PerSampleGradNorm(one) as outer, PerSampleGradNorm(two) as inner:
            (wave(one(x)) + wave(two(x))).backward()
        assert_norms(outer, one_backward_a_sample(one, x))
        assert_norms(inner, one_backward_a_sample(two, x))

    def test_nested_one_after_the_other(self):
        one, two, x = small(), small(), torch.randn(5, 6)
        with PerSampleGradNorm(one) as outer:
            with PerSampleGradNorm(two) as inner:
                wave(two(x)).backward()
            wave(one(x)).backward()
        assert_norms(outer, one_backward_a_sample(one, x))
        assert_norms(inner, one_backward_a_sample(two, x))

    def test_labels(self):
        model, x = batch_norm_model(train=True), torch.randn(6, 3, 4, 4)
        with PerSampleGradNorm(model, batchnorm="fixed_statistics") as norms:
            wave(model(x)).backward()
        assert [label for label in norms.labels if label.startswith("batchnorm: ")]
        with PerSampleGradNorm(model.eval(), batchnorm="fixed_statistics") as norms:
            wave(model(x)).backward()
        assert norms.labels == ()

    def test_layers_add_up(self):
        model, ids = GPT(), torch.randint(13, (5, 6))
        with PerSampleGradNorm(model) as norms:
            next_token(model, (ids,), ()).backward()
        layers = norms.by_layer()
        assert set(layers) <= {name for name, _ in model.named_modules()}
        torch.testing.assert_close(sum(v.square() for v in layers.values()).sqrt(), norms.total(), rtol=1e-6, atol=0)

    def test_half_precision_models_give_float32(self):
        model, x = small().bfloat16(), torch.randn(5, 6).bfloat16()
        with PerSampleGradNorm(model) as norms:
            wave(model(x)).backward()
        assert norms.total().dtype == torch.float32
        assert all(values.dtype == torch.float32 for values in norms.by_layer().values())

    def test_deterministic(self):
        model, ids = GPT(), torch.randint(13, (8, 6))
        found = []
        for _ in range(3):
            with PerSampleGradNorm(model, weight_gradients="none") as norms:
                next_token(model, (ids,), ()).backward()
            found.append(norms.total())
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


class TestNoNumberWithoutABackward:
    def test_before_the_backward(self):
        model = small()
        with PerSampleGradNorm(model) as norms:
            wave(model(torch.randn(5, 6)))
            with pytest.raises((ValueError, RuntimeError), match="backward"):
                norms.total()

    def test_without_a_forward(self):
        with PerSampleGradNorm(small()) as norms:
            pass
        with pytest.raises((ValueError, RuntimeError)):
            norms.total()
        with pytest.raises((ValueError, RuntimeError)):
            norms.by_layer()

    def test_a_forward_from_before_the_context(self):
        """Its calls were not seen: a number would miss them."""
        model = small()
        loss = wave(model(torch.randn(5, 6)))

        def run():
            with PerSampleGradNorm(model) as norms:
                loss.backward()
            return norms.total()

        refuses(run)

    def test_half_of_the_forward_from_before_the_context(self):
        model, x = small(), torch.randn(5, 6)
        earlier = wave(model(x))

        def run():
            with PerSampleGradNorm(model) as norms:
                (wave(model(x)) + earlier).backward()
            return norms.total()

        refuses(run)

    def test_the_backward_after_the_context(self):
        model = small()
        with PerSampleGradNorm(model) as norms:
            loss = wave(model(torch.randn(5, 6)))
        loss.backward()
        with pytest.raises((ValueError, RuntimeError)):
            norms.total()

    def test_two_batches_of_unequal_size_in_one_loss(self):
        model = small()

        def run():
            with PerSampleGradNorm(model) as norms:
                (wave(model(torch.randn(5, 6))) + wave(model(torch.randn(4, 6)))).backward()
            return norms.total()

        refuses(run)

    def test_nothing_trainable(self):
        with pytest.raises(ValueError, match="parameter"):
            PerSampleGradNorm(small().requires_grad_(False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_gradients": "some"}, "some"),
        ({"batchnorm": "running"}, "running"),
        ({"fallback": "vmap"}, "vmap"),
        ({"loss_reduction": "average"}, "average"),
        ({"loss_reduction": 0.0}, "loss_reduction"),
        ({"loss_reduction": float("nan")}, "loss_reduction"),
        ({"parameters": []}, "parameters"),
        ({"parameters": 3}, "parameters"),
        ({"sample_ids": [0, 1]}, "sample_ids"),
        ({"sample_ids": torch.tensor([0.0, 1.0])}, "sample_ids"),
        ({"sample_ids": torch.tensor([[0, 1]])}, "sample_ids"),
        ({"sample_ids": torch.tensor([0, -1, 1, 2, 0])}, "sample_ids"),
    ],
)
def test_bad_options_are_named(options, message):
    model, x = small(), torch.randn(5, 6)
    with pytest.raises((ValueError, TypeError), match=message), PerSampleGradNorm(model, **options):
        wave(model(x)).backward()


def test_the_model_must_be_a_module():
    with pytest.raises(TypeError):
        PerSampleGradNorm(lambda x: x)


@pytest.mark.parametrize("mode", ["plain", "fused", "none"])
class TestMemory:
    """Beyond a plain backward: O(N + the largest layer), whatever the depth, and no N x parameters."""

    n, d, length = 64, 96, 8

    def peak(self, depth: int, mode: str | None) -> int:
        model = nn.Sequential(
            *(layer for _ in range(depth) for layer in (nn.Linear(self.d, self.d), nn.LayerNorm(self.d)))
        )
        x = torch.randn(self.n, self.length, self.d)

        def run():
            model.zero_grad(set_to_none=True)
            if mode is None:
                wave(model(x)).backward()
                return []
            with PerSampleGradNorm(model, weight_gradients=mode) as norms:
                wave(model(x)).backward()
            return [norms.total()]

        run()
        return extra_bytes(run, torch.device("cpu"))

    def test_peak(self, mode):
        shallow, deep = 3, 12
        layer = 4 * (
            2 * self.n * self.length * self.d + self.d * self.d
        )  # input, output gradient, weight of the largest
        per_sample_weights = 4 * self.n * self.d * self.d  # of one layer
        extra = {depth: self.peak(depth, mode) - self.peak(depth, None) for depth in (shallow, deep)}
        rows = 4 * self.n * 2 * (deep - shallow)  # a number a sample and layer
        assert extra[deep] <= 2 * layer + 8 * rows, f"{extra[deep]} bytes; the largest layer takes {layer}"
        assert extra[deep] - extra[shallow] <= layer / 2 + 8 * rows, f"grows with the depth: {extra}"
        assert extra[deep] < per_sample_weights, "as much as a gradient a sample"


class Written(nn.Module):
    """Writes to the input of a layer, or to its output, after the call."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.last, self.shift = nn.Linear(6, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.where = where

    def forward(self, x):
        h = self.first(x)
        out = self.last(h)
        (h if self.where == "input" else out).add_(self.shift)
        return out


@pytest.mark.parametrize("mode", ["plain", "fused", "none"])
def test_an_input_that_is_written_to_afterwards_is_refused_as_autograd_does(mode):
    """Also where the backward pass itself needs it no more: the norm would be that of another input."""
    model, x = Written("input"), torch.randn(5, 6)
    with (
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
        PerSampleGradNorm(model, weight_gradients=mode),
    ):
        wave(model(x)).backward()


@pytest.mark.parametrize("mode", ["plain", "none"])
def test_a_forward_without_a_backward_leaves_nothing(mode):
    """Not even for the collector: what a call keeps for the backward pass does not keep the call's own output."""
    model, x = Written("output"), torch.randn(5, 6)
    with PerSampleGradNorm(model, weight_gradients=mode):
        out = model(x)
    output = weakref.ref(out)
    del out
    assert output() is None


@pytest.mark.parametrize("hooked", [False, True])
def test_normalisation_layers_give_their_moments_once(hooked, monkeypatch):
    """The forward pass found them; where hooks on saved tensors hide them they are found again."""

    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.group, self.layer = nn.Conv1d(3, 8, 3), nn.GroupNorm(2, 8), nn.LayerNorm((8, 5))

        def forward(self, x):
            return self.layer(self.group(self.conv(x)).relu())

    model, x = Norms(), torch.randn(4, 3, 7)
    again = []
    for name in ("native_layer_norm", "native_group_norm"):
        function = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, of=function: again.append(of) or of(*args))
    packing = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with packing if hooked else contextlib.nullcontext(), PerSampleGradNorm(model, weight_gradients="none") as norms:
        wave(model(x)).backward()
    assert len(again) == (2 if hooked else 0)
    assert_norms(norms, one_backward_a_sample(model, x))
