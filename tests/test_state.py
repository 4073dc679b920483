"""Options and state: what is accepted, what is refused whole, what survives a save."""

import copy
import dataclasses
import math

import pytest
import torch

from adaselect_kernels import AdaSelectionOptions, AdaSelectionState, fused_select
from adaselect_kernels.options import METHODS, PackedOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 1.5}, r"beta must be in \[-1, 1\], got 1.5"),
        ({"beta": math.nan}, "beta"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.inf}, "temperature"),
        ({"weight_floor": -0.1}, r"weight_floor must be in \[0, 1\]"),
        ({"weight_floor": 1.1}, "weight_floor"),
        ({"update": "ratio"}, "update must be one of 'relative', 'log_ratio'; got 'ratio'"),
        ({"method_loss": "mean"}, "method_loss must be one of"),
        ({"curriculum_scale": "l2"}, "curriculum_scale must be one of"),
        ({"curriculum_power": math.inf}, "curriculum_power must be finite"),
    ],
)
def test_options_outside_their_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AdaSelectionOptions(**changes)


@pytest.mark.parametrize(
    "changes", [{"beta": "1"}, {"standardize": 1}, {"temperature": None}, {"curriculum_power": "a"}]
)
def test_options_of_a_wrong_type_are_refused(changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        AdaSelectionOptions(**changes)


def test_packed_options_hold_every_field():
    options = AdaSelectionOptions(-0.5, 2.0, True, "log_ratio", "selected", 0.25, -1.0, "rms")
    assert options.packed == PackedOptions(-0.5, 2.0, 1.0, 1.0, 1.0, 0.25, -1.0, 1.0, 0.0)
    assert math.isnan(AdaSelectionOptions().packed.curriculum_power)
    assert len(dataclasses.fields(options)) == len(PackedOptions._fields) - 1


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ("big_loss", TypeError, "tuple or list"),
        ((), ValueError, "at least one"),
        (("big_loss", "loss"), ValueError, "got 'loss'"),
        (("uniform", "uniform"), ValueError, "distinct"),
    ],
)
def test_methods_are_checked(methods, error, message):
    with pytest.raises(error, match=message):
        AdaSelectionState.create(methods)


@pytest.mark.parametrize(
    ("seed", "error"), [(2**64, ValueError), (-(2**63) - 1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_seed_is_checked(seed, error):
    with pytest.raises(error, match="seed"):
        AdaSelectionState.create(("uniform",), seed=seed)


def used_state(generator, steps=3) -> AdaSelectionState:
    state = AdaSelectionState.create(METHODS, "cpu", seed=2**63 + 11)
    for _ in range(steps):
        logits = torch.randn(40, 5, generator=generator)
        fused_select(logits, torch.randint(5, (40,), generator=generator), 0.3, methods=METHODS, state=state)
    return state


def test_a_fresh_state_has_equal_weights_no_losses_and_step_one():
    state = AdaSelectionState.create(METHODS[:4])
    assert state.weights.tolist() == pytest.approx([0.25] * 4)
    assert state.previous_losses.isnan().all()
    assert state.step.item() == 1


def test_round_trip_through_a_file_continues_bit_for_bit(generator, tmp_path):
    state = used_state(generator)
    torch.save(state.state_dict(), tmp_path / "state.pt")
    restored = AdaSelectionState.create(METHODS, seed=5)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        logits = torch.randn(40, 5, generator=generator)
        targets = torch.randint(5, (40,), generator=generator)
        one = fused_select(logits, targets, 0.3, methods=METHODS, state=state)
        two = fused_select(logits, targets, 0.3, methods=METHODS, state=restored)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert torch.equal(state.buffer, restored.buffer)
    assert restored.seed == state.seed


def test_a_saved_state_does_not_change_with_the_run(generator):
    state = used_state(generator)
    saved = state.state_dict()
    before = copy.deepcopy(saved)
    fused_select(torch.randn(4, 5), torch.zeros(4, dtype=torch.long), 0.5, methods=METHODS, state=state)
    assert all(torch.equal(saved[key], before[key]) for key in ("log_weights", "previous_losses", "step"))


def broken(key, value):
    def change(saved):
        saved[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("step"), "expected the keys"),
        (broken("other", 1), "expected the keys"),
        (broken("format", 2), "format 2"),
        (broken("methods", ("uniform",)), "methods"),
        (broken("seed", "a"), "seed"),
        (broken("log_weights", torch.zeros(7, dtype=torch.float64)), "sum to 1"),
        (broken("log_weights", torch.full((7,), math.nan, dtype=torch.float64)), "sum to 1"),
        (broken("log_weights", torch.zeros(6, dtype=torch.float64)), "shape"),
        (broken("previous_losses", torch.zeros(7)), "float64"),
        (broken("previous_losses", torch.full((7,), math.inf, dtype=torch.float64)), "finite or NaN"),
        (broken("step", torch.tensor(0)), "step must be in"),
        (broken("step", 3), "step must be a"),
    ],
)
def test_a_foreign_or_corrupt_state_is_refused_whole(generator, change, message):
    state = used_state(generator)
    before, seed = state.buffer.clone(), state.seed
    saved = used_state(generator, 5).state_dict()
    saved["seed"] = 77
    change(saved)
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(saved)
    assert torch.equal(state.buffer, before)
    assert state.seed == seed


def test_something_else_than_a_mapping_is_refused():
    with pytest.raises(ValueError, match="got list"):
        AdaSelectionState.create(("uniform",)).load_state_dict([1])


def test_to_the_same_device_is_the_same_state():
    state = AdaSelectionState.create(("uniform",), "cpu")
    assert state.to("cpu") is state
    moved = state.to("meta")
    assert moved.device.type == "meta"
    assert moved.methods == state.methods
