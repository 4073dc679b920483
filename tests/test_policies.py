"""Policies: the functions behind them, the state they carry, what they refuse, and the page that explains them."""

import copy
import dataclasses
import inspect
import io
import pathlib
import re

import numpy as np
import pytest
import torch

from adaselect_kernels.functional import baseline_select, baseline_select_from_losses, fused_select, select_from_losses
from adaselect_kernels.options import METHODS, AdaSelectionOptions
from adaselect_kernels.policies import POLICIES, RECOMMENDED, get_policy
from adaselect_kernels.state import AdaSelectionState
from tests.states import flat

DOCS = pathlib.Path(__file__).parents[1] / "docs"
NEIGHBOURS = ("importance", "rho_loss", "selective_backprop")  # tests/test_neighbours.py has their rules
NAMES = sorted(set(POLICIES) - {"rho_loss"})  # which needs more than logits and targets
BASELINES = sorted(set(POLICIES) - {"adaselection", *NEIGHBOURS})


def batch(generator, rows=24, classes=5):
    return torch.randn(rows, classes, generator=generator) * 2, torch.randint(classes, (rows,), generator=generator)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_method_is_a_policy():
    assert sorted(METHODS) == BASELINES


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_its_function(name, generator):
    policy, state = get_policy(name, 0.3, seed=7), AdaSelectionState.create((name,), seed=7)
    for _ in range(3):
        logits, targets = batch(generator)
        assert same(policy.select(logits, targets), baseline_select(logits, targets, 0.3, name, state=state))
        losses, norms = torch.rand(20, generator=generator), torch.rand(20, generator=generator)
        expected = baseline_select_from_losses(losses, 0.3, name, grad_norms=norms, state=state)
        assert same(policy.select_from_losses(losses, norms), expected)
    assert policy.state.step.item() == 7


OPTIONS = {
    "beta": -0.5,
    "temperature": 0.5,
    "standardize": True,
    "update": "log_ratio",
    "method_loss": "selected",
    "weight_floor": 0.9,
    "curriculum_power": -0.5,
}
METHODS_USED = ("big_loss", "grad_norm", "uniform")


@pytest.mark.parametrize("option", [None, *OPTIONS, "curriculum_scale"])
def test_adaselection_is_its_function_under_every_option(option, generator):
    given = {} if option is None else {option: OPTIONS.get(option)}
    if option == "curriculum_scale":
        given = {"curriculum_power": 1.0, "curriculum_scale": "rms"}
    policy = get_policy("adaselection", 0.3, methods=METHODS_USED, seed=3, **given)
    default = get_policy("adaselection", 0.3, methods=METHODS_USED, seed=3)
    state = AdaSelectionState.create(METHODS_USED, seed=3)
    settings = {"methods": METHODS_USED, "options": AdaSelectionOptions(**given), "state": state}
    differs = False
    for _ in range(3):
        logits, targets = batch(generator)
        chosen = policy.select(logits, targets)
        assert same(chosen, fused_select(logits, targets, 0.3, **settings))
        differs |= not torch.equal(chosen.scores, default.select(logits, targets).scores)
        losses, norms = torch.rand(20, generator=generator), torch.rand(20, generator=generator)
        expected = select_from_losses(losses, 0.3, grad_norms=norms, **settings)
        assert same(policy.select_from_losses(losses, norms), expected)
        default.select_from_losses(losses, norms)
    assert differs == (option is not None)
    assert torch.equal(policy.state.buffer, state.buffer)


def test_options_cover_every_field():
    assert {*OPTIONS, "curriculum_scale"} == {field.name for field in dataclasses.fields(AdaSelectionOptions)}


@pytest.mark.parametrize("name", ["adaselection", "big_loss"])
@pytest.mark.parametrize(
    "setting", [{"unit": "token"}, {"order": "score"}, {"ignore_index": 1}, {"label_smoothing": 0.3}], ids=str
)
def test_settings_of_the_functions_reach_them(name, setting):
    generator = torch.Generator().manual_seed(0)  # fixed: three rows in order by chance would hide a lost `order`
    logits = torch.randn(6, 4, 3, generator=generator)
    targets = torch.randint(3, (6, 4), generator=generator)
    targets[0, 0] = 1
    chosen = get_policy(name, 0.5, **setting).select(logits, targets)
    function = fused_select if name == "adaselection" else baseline_select
    method = () if name == "adaselection" else (name,)
    assert same(chosen, function(logits, targets, 0.5, *method, **setting))
    default = function(logits, targets, 0.5, *method)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(chosen, default, strict=True))


def test_order_reaches_the_choice_from_losses():
    losses = torch.tensor([1.0, 3.0, 2.0])
    for name, more in (("big_loss", {}), ("adaselection", {"methods": ("big_loss",)})):
        assert get_policy(name, 1.0, order="score", **more).select_from_losses(losses).indices.tolist() == [1, 2, 0]
        assert get_policy(name, 1.0, **more).select_from_losses(losses).indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["adaselection", "big_loss"])
def test_impl_is_requested_not_preferred(name):
    policy = get_policy(name, 0.5, impl="cuda")
    with pytest.raises(RuntimeError, match="impl='cuda'"):
        policy.select_from_losses(torch.rand(4))
    assert policy.state.step.item() == 1


def test_uniform_draws_afresh_in_every_call_and_repeats_by_seed():
    draws = [
        [policy.select_from_losses(torch.zeros(1000)).indices.tolist() for _ in range(3)]
        for policy in (
            get_policy("uniform", 0.1, seed=1),
            get_policy("uniform", 0.1, seed=1),
            get_policy("uniform", 0.1),
        )
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws[0] + draws[2]}) == 6


def test_adaboost_alone_equals_big_loss_and_says_so(generator):
    logits, targets = batch(generator, rows=101)
    chosen = [get_policy(name, 0.37).select(logits, targets).indices for name in ("adaboost", "big_loss")]
    assert torch.equal(*chosen)
    assert "Monotone in the loss" in inspect.getdoc(POLICIES["adaboost"])


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_continues_bit_for_bit(name, generator):
    settings = {"methods": METHODS, "beta": 0.7} if name == "adaselection" else {}
    policy = get_policy(name, 0.3, seed=5, **settings)
    batches = [batch(generator) for _ in range(6)]
    for logits, targets in batches[:3]:
        policy.select(logits, targets)
    saved = through_a_file(policy.state_dict())
    expected = [policy.select(*pair) for pair in batches[3:]]
    restored = get_policy(name, 0.3, **settings)
    restored.load_state_dict(saved)
    got = [restored.select(*pair) for pair in batches[3:]]
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert flat(restored.state_dict()) == flat(policy.state_dict())


def test_loading_changes_the_result():
    """The test above could not fail if the state did not matter."""
    losses = [torch.rand(50, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    policy = get_policy("adaselection", 0.3)
    for values in losses[:8]:
        policy.select_from_losses(values)
    fresh = get_policy("adaselection", 0.3)
    assert not torch.equal(policy.select_from_losses(losses[8]).scores, fresh.select_from_losses(losses[8]).scores)


def test_a_saved_dictionary_is_a_copy():
    policy = get_policy("uniform", 0.5)
    saved = policy.state_dict()
    policy.select_from_losses(torch.rand(4))
    assert saved["state"]["step"].item() == 1


def test_the_seed_travels_with_the_state_and_impl_may_differ():
    policy = get_policy("uniform", 0.5, seed=11)
    other = get_policy("uniform", 0.5, seed=12, impl="reference")
    other.load_state_dict(policy.state_dict())
    assert other.state.seed == 11


def spoil(*path_and_value):
    *path, last, value = path_and_value

    def change(state):
        target = state
        for key in path:
            target = target[key]
        target[last] = value

    return change


CORRUPT = {
    "another policy": spoil("policy", "small_loss"),
    "another format": spoil("format", 2),
    "another gamma": spoil("config", "gamma", 0.31),
    "another beta": spoil("config", "beta", 0.5),
    "another order": spoil("config", "order", "score"),
    "other methods": spoil("config", "methods", ["big_loss"]),
    "a setting too few": lambda state: state["config"].pop("unit"),
    "no settings": spoil("config", None),
    "an entry too many": spoil("more", 1),
    "an entry too few": lambda state: state.pop("state"),
    "weights that do not sum to 1": lambda state: state["state"]["log_weights"].add_(1),
    "no state": spoil("state", None),
    "a step of 0": lambda state: state["state"]["step"].zero_(),
}


@pytest.mark.parametrize("change", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_foreign_or_corrupt_state_is_refused_whole(change):
    policy = get_policy("adaselection", 0.3, seed=1)
    policy.select_from_losses(torch.rand(10))
    before = flat(policy.state_dict())
    saved = get_policy("adaselection", 0.3, seed=2).state_dict()
    policy_copy = copy.deepcopy(policy)
    policy_copy.load_state_dict(saved)  # sound as it is
    change(saved)
    with pytest.raises(ValueError):
        policy.load_state_dict(saved)
    assert flat(policy.state_dict()) == before
    assert policy.state.seed == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"gamma": 0.2},
        {"methods": ("uniform",)},
        {"beta": 0.5},
        {"unit": "token"},
        {"order": "score"},
        {"ignore_index": 0},
        {"label_smoothing": 0.1},
    ],
    ids=str,
)
def test_every_setting_that_changes_the_result_must_agree(setting):
    saved = get_policy("adaselection", **{"gamma": 0.3, **setting}).state_dict()
    with pytest.raises(ValueError, match="settings"):
        get_policy("adaselection", 0.3).load_state_dict(saved)


def test_what_is_no_state_at_all_is_refused():
    with pytest.raises(ValueError, match="not a state of a policy: got list"):
        get_policy("big_loss", 0.3).load_state_dict([])  # type: ignore[arg-type]


def test_other_settings_may_take_the_weights_on_purpose():
    policy = get_policy("adaselection", 0.3)
    for _ in range(3):
        policy.select_from_losses(torch.rand(10))
    other = get_policy("adaselection", 0.1)
    other.state.load_state_dict(policy.state_dict()["state"])
    assert torch.equal(other.state.buffer, policy.state.buffer)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_numpy_do_not_spoil_the_file(name):
    more = {"beta": np.float64(0.5), "temperature": np.float32(2)} if name == "adaselection" else {}
    policy = get_policy(name, np.float64(0.25), label_smoothing=np.float32(0.5), **more)
    get_policy(name, 0.25, label_smoothing=0.5, **({"beta": 0.5, "temperature": 2} if more else {})).load_state_dict(
        through_a_file(policy.state_dict())
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("biggest", 0.3), ValueError, "'big_loss'.*got 'biggest'"),
        ((["big_loss"], 0.3), ValueError, "got \\['big_loss'\\]"),
        (("big_loss", 0.0), ValueError, "gamma must be in"),
        (("big_loss", 1.5), ValueError, "gamma must be in"),
        (("adaselection", float("nan")), ValueError, "gamma must be in"),
        (("big_loss", "0.3"), TypeError, "gamma must be a number"),
        (("big_loss", True), TypeError, "gamma must be a number"),
    ],
)
def test_names_and_rates_are_checked_when_made(arguments, error, match):
    with pytest.raises(error, match=match):
        get_policy(*arguments)


@pytest.mark.parametrize(
    ("name", "config", "error", "match"),
    [
        ("big_loss", {"beta": 1.0}, TypeError, "'big_loss' has no setting 'beta'; it accepts seed, unit"),
        ("uniform", {"methods": ("uniform",)}, TypeError, "no setting 'methods'"),
        ("adaselection", {"betta": 1.0}, TypeError, "no setting 'betta'; it accepts .*curriculum_scale"),
        ("adaselection", {"beta": 2.0}, ValueError, "beta must be in"),
        ("adaselection", {"methods": ("big",)}, ValueError, "methods must be one of"),
        ("adaselection", {"methods": ("uniform", "uniform")}, ValueError, "distinct"),
        ("adaselection", {"update": "absolute"}, ValueError, "update must be one of"),
        ("big_loss", {"seed": 1.5}, TypeError, "seed must be an int"),
        ("big_loss", {"seed": 2**64}, ValueError, "64 bits"),
        ("big_loss", {"unit": "word"}, ValueError, "unit must be one of"),
        ("big_loss", {"order": "random"}, ValueError, "order must be one of"),
        ("big_loss", {"ignore_index": 0.5}, TypeError, "ignore_index must be an int"),
        ("big_loss", {"label_smoothing": 1.5}, ValueError, "label_smoothing must be in"),
        ("big_loss", {"impl": "fast"}, ValueError, "impl must be one of"),
    ],
)
def test_settings_are_checked_when_made(name, config, error, match):
    with pytest.raises(error, match=match):
        get_policy(name, 0.3, **config)


def test_the_configuration_is_frozen():
    policy = get_policy("adaselection", 0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.config.gamma = 0.5  # type: ignore[misc]


class TestDevice:
    """The meta device stands for a second one: it follows the same rules and needs no hardware."""

    def test_the_state_follows_the_first_call_and_stays(self):
        policy = get_policy("big_loss", 0.5)
        policy.select_from_losses(torch.empty(4, device="meta"))
        assert policy.state.device.type == "meta"
        with pytest.raises(ValueError, match="state must be on the device of the input, cpu, got meta"):
            policy.select_from_losses(torch.rand(4))

    def test_a_refused_call_is_not_the_first(self):
        policy = get_policy("big_loss", 0.5)
        with pytest.raises(ValueError, match="N >= 1"):
            policy.select_from_losses(torch.empty(0, device="meta"))
        assert policy.select_from_losses(torch.rand(4)).indices.shape == (2,)

    def test_on_request_it_is_there_from_the_start_or_moves(self):
        policy = get_policy("big_loss", 0.5, device="meta")
        assert policy.state.device.type == "meta"
        with pytest.raises(ValueError, match="state must be on the device"):
            policy.select_from_losses(torch.rand(4))
        policy = get_policy("big_loss", 0.5, device="cpu")
        with pytest.raises(ValueError, match="state must be on the device"):
            policy.select_from_losses(torch.empty(4, device="meta"))
        assert policy.to("meta") is policy
        policy.select_from_losses(torch.empty(4, device="meta"))

    def test_a_loaded_state_follows_the_first_call(self):
        saved = get_policy("big_loss", 0.5)
        saved.select_from_losses(torch.rand(4))
        policy = get_policy("big_loss", 0.5)
        policy.load_state_dict(saved.state_dict())
        policy.select_from_losses(torch.empty(4, device="meta"))
        assert policy.state.device.type == "meta"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_saved_on_one_device_continued_on_another(self, generator):
        batches = [batch(generator) for _ in range(4)]
        policy = get_policy("adaselection", 0.3)
        for logits, targets in batches[:2]:
            policy.select(logits, targets)
        other = get_policy("adaselection", 0.3)
        other.load_state_dict(policy.state_dict())
        for logits, targets in batches[2:]:
            here, there = policy.select(logits, targets), other.select(logits.cuda(), targets.cuda())
            torch.testing.assert_close(there.scores.cpu(), here.scores)
        assert other.state.device.type == "cuda"
        back = get_policy("adaselection", 0.3)
        back.load_state_dict(other.state_dict())
        assert torch.equal(back.state.buffer, other.state.buffer.cpu())


def test_a_policy_traces_as_one_graph(generator):
    logits, targets = batch(generator)
    plain, traced = get_policy("adaselection", 0.3), get_policy("adaselection", 0.3)
    compiled = torch.compile(lambda z, y: traced.select(z, y).indices, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(logits, targets), plain.select(logits, targets).indices)
    assert torch.equal(plain.state.buffer, traced.state.buffer)


def test_the_page_names_every_policy():
    text = (DOCS / "policies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(POLICIES)


def test_the_recommended_settings_are_those_the_page_names():
    policy = get_policy("adaselection", 0.3, **RECOMMENDED)
    assert policy.methods == ("big_loss", "uniform")
    assert policy.config.options == AdaSelectionOptions(update="log_ratio")
    page = (DOCS / "when_it_pays.md").read_text(encoding="utf-8")
    assert "**RECOMMENDED" in page
    assert all(f"`{word}`" in page for word in (*RECOMMENDED["methods"], RECOMMENDED["update"]))
