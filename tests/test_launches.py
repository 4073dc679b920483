"""Launches of the public calls, recorded without a GPU: how many, in which order, with which grids; and their Python cost."""

import functools
import gc
import os
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter has no driver to stand in for", allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs

from adaselect_kernels import AdaSelectionState, dispatch, fused_select, per_sample_stats, reference, select_topk
from adaselect_kernels.kernels import runtime, select
from benchmarks.launches import TARGET, cpu_batch, host_cost, record, stand_in


def names(launches):
    return [launch.kernel for launch in launches]


@pytest.mark.parametrize(
    ("n", "classes", "expected"),
    [
        (128, 10, ["fused_kernel"]),  # the paper's setting
        (4096, 10, ["fused_kernel"]),  # the largest single launch
        (4097, 10, ["tile_kernel", "large_kernel"]),  # one more row
        (8192, 100, ["tile_kernel", "large_kernel"]),
        (128, 128256, ["stream_kernel", "batch_kernel"]),  # long rows
    ],
)
def test_launches_of_a_selection(n, classes, expected):
    logits, targets = cpu_batch(n, classes, torch.bfloat16)
    assert names(record(lambda: fused_select(logits, targets, 0.3, impl="triton"))) == expected


def test_launches_of_statistics_and_top_k():
    logits, targets = cpu_batch(300, 1000)
    (launch,) = record(lambda: per_sample_stats(logits, targets, impl="triton"))
    assert launch.kernel == "tile_kernel"
    assert launch.grid == (75, 1, 1)  # four warps a program, a warp a row
    assert launch.num_warps == 4
    assert launch.source.signature["logits_ptr"] == "*fp32"
    scores = torch.zeros(1 << 20)
    (launch,) = record(lambda: select_topk(scores, 1000, order="index", impl="triton"))
    assert launch.kernel == "radix_kernel"
    digits = -(-32 // select.DIGIT_BITS)
    assert launch.grid == ((digits + 1) * 512, 1, 1)  # a step a digit, and the compaction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thread_keeps_a_short_row_to_itself(dtype):
    """Eleven classes have no vector width. Threads dealt over a row's columns would shuffle for every sum."""
    logits, targets = cpu_batch(300, 11, dtype)
    (launch,) = record(lambda: per_sample_stats(logits, targets, impl="triton"))
    compiled = triton.compile(launch.source, target=TARGET, options={"num_warps": 4, "enable_fp_fusion": True})
    assert "ex2.approx" in compiled.asm["ptx"]
    assert "shfl" not in compiled.asm["ptx"]


def test_few_long_rows_are_split_over_a_whole_gpu():
    logits, targets = cpu_batch(8, 128256)
    (launch,) = record(lambda: per_sample_stats(logits, targets, impl="triton"))
    assert launch.grid == (8 * 31, 1, 1)  # at least 4096 columns each


def test_a_recording_keeps_the_tensors():
    scores = torch.zeros(5000)
    for _ in range(2):
        launches = record(lambda: select_topk(scores, 5, order="index", impl="triton"))
        assert all(launch.arguments[0].data_ptr() == scores.data_ptr() for launch in launches)


def test_a_recording_leaves_nothing_behind(generator):
    logits, targets = torch.randn(8, 5, generator=generator), torch.randint(5, (8,), generator=generator)

    def losses():
        return fused_select(logits, targets, 0.5).losses

    right = losses()
    with pytest.raises(ZeroDivisionError):
        record(lambda: (losses(), 1 / 0))
    assert torch.equal(losses(), right)
    expected = reference.per_sample_stats(logits, targets, [0], "sample", -100, 0.0)[0]
    torch.testing.assert_close(right, expected)
    reason = dispatch.unavailable("triton", logits.device)
    assert reason is not None
    with pytest.raises(RuntimeError, match="cuda tensors"):
        fused_select(logits, targets, 0.5, impl="triton")


def test_host_cost_counts_the_work_of_the_call():
    logits, targets = cpu_batch(128, 10)

    def once():
        fused_select(logits, targets, 0.3, impl="triton")

    def slowly():
        once()
        sum(range(200_000))  # milliseconds

    one, slow = (host_cost(call, calls=20, rounds=5) for call in (once, slowly))
    assert 1.0 < one < 10_000.0
    assert slow - one > 500.0


# --- launches that skip Triton's dispatch ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "option"])
def probe_kernel(a_ptr, b_ptr, n, stride, option: tl.int64, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    """Every kind of parameter the launchers have."""


@triton.jit
def specialising_kernel(a_ptr, option: tl.int64, BLOCK: tl.constexpr):
    """What a launch must refuse: Triton looks at the value of an option."""


class Pointer:
    """A tensor as far as a launch looks at it."""

    def __init__(self, address=1 << 20, dtype=torch.float32, device=-1):
        self.address, self.dtype, self.device = address, dtype, device

    def data_ptr(self):
        return self.address

    def get_device(self):
        return self.device


@pytest.fixture
def dispatched(monkeypatch):
    """How many launches went through Triton's dispatch."""
    count = []
    dispatch_ = runtime.Launch._dispatch
    monkeypatch.setattr(runtime.Launch, "_dispatch", lambda *args: (count.append(1), dispatch_(*args))[1])
    return count


def as_it_runs(call):
    """The launches of `call`, those alike without Triton's dispatch."""
    log = []
    with stand_in(log):
        call()
    return log


def probe(n=100, stride=3, flag=True, block=16):
    return runtime.Launch(probe_kernel, (7,), (n, stride), {"FLAG": flag, "BLOCK": block}, 4)


def plain(launch):
    """A recorded launch in terms of what runs: the specialised source and the arguments, tensors as addresses."""
    arguments = tuple(getattr(argument, "data_ptr", lambda a=argument: a)() for argument in launch.arguments)
    source = launch.source
    specialised = {key: value for key, value in source.attrs.items() if value}
    return launch.kernel, launch.grid, launch.num_warps, source.signature, source.constants, specialised, arguments


def test_a_direct_launch_is_the_one_triton_would_make():
    """All that Triton specialises on: alignment, types, integers that are 1, multiples of 16, or need 64 bits."""
    seed = int(os.environ.get("ADASELECT_TEST_SEED", random.SystemRandom().getrandbits(32)))
    draw = random.Random(seed)
    integers = (1, 0, 7, 16, 48, 2**31 - 1, 2**31, 2**31 + 16, -100)
    probes = [probe(draw.choice(integers), draw.choice(integers), draw.random() < 0.5) for _ in range(30)]
    sources = set()
    for _ in range(600):
        launch = draw.choice(probes)
        addresses = [draw.choice((4096, 4096 + 16, 4096 + 4, 4096 + 8)) for _ in range(2)]
        tensors = [Pointer(address, draw.choice((torch.float32, torch.int64))) for address in addresses]
        options = (draw.choice((0, 1, 16, 2**40, -(2**63))),)
        call = functools.partial(launch, *tensors, options=options)
        (direct,), (right,) = as_it_runs(call), record(call)
        assert plain(direct) == plain(right), f"ADASELECT_TEST_SEED={seed}"
        sources.add(str(plain(right)[3:6]))
    assert len(sources) > 20


def test_options_that_triton_would_specialise_on_are_refused():
    with pytest.raises(TypeError, match="specialises on an option"):
        runtime.Launch(specialising_kernel, (1,), (), {"BLOCK": 16}, 4)


def test_launches_alike_are_dispatched_once(dispatched):
    launch = probe()

    def twice(*tensors):
        dispatched.clear()
        as_it_runs(lambda: [launch(*tensors, options=(i,)) for i in range(2)])
        return len(dispatched)

    assert twice(Pointer(), Pointer()) == 1
    assert twice(Pointer(), Pointer()) == 0
    assert twice(Pointer(), Pointer(dtype=torch.float64)) == 1
    assert twice(Pointer(device=0), Pointer(device=0)) == 1
    assert twice(Pointer(device=1), Pointer(device=1)) == 1
    assert twice(Pointer(), Pointer(device=1)) == 1, "Triton must see a tensor that is elsewhere"
    assert twice(Pointer(), Pointer((1 << 20) + 8)) == 2, "a tensor that is not aligned must be looked at every time"
    with pytest.raises(TypeError):
        as_it_runs(lambda: launch(Pointer(), Pointer()))  # an option is missing


def test_a_kernel_stays_loaded_when_triton_forgets_it(dispatched):
    """Triton unloads a kernel with its last reference, and then its function must not be launched any more."""
    launch = probe()
    as_it_runs(lambda: launch(Pointer(), Pointer(), options=(0,)))
    ((*_, kernel),) = launch._compiled.values()
    alive = weakref.ref(kernel)
    del kernel
    probe_kernel.device_caches.clear()
    gc.collect()
    assert alive() is not None
    as_it_runs(lambda: launch(Pointer(), Pointer(), options=(0,)))
    assert len(dispatched) == 1


def test_a_profiler_sees_every_launch(dispatched):
    launch = probe()
    as_it_runs(lambda: launch(Pointer(), Pointer(), options=(0,)))
    dispatched.clear()

    def hook(metadata):
        return None

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(hook)
        as_it_runs(lambda: launch(Pointer(), Pointer(), options=(0,)))
        chain.remove(hook)
    assert len(dispatched) == 2
    as_it_runs(lambda: launch(Pointer(), Pointer(), options=(0,)))
    assert len(dispatched) == 2


def test_public_calls_launch_alike_with_and_without_dispatch(generator):
    """Repeated calls, in the layouts that change a specialisation, one after the other on the same remembered plans."""
    flat = torch.randn(16 * 24 + 1, generator=generator)
    aligned, misaligned = flat[:-1].view(16, 24), flat[1:].view(16, 24)
    transposed = flat[:-1].view(24, 16).t()
    one_column = flat[:16].view(16, 1)
    targets = torch.zeros(16, dtype=torch.int64)
    state = AdaSelectionState.create(("big_loss", "small_loss", "uniform"), seed=2**63 + 1)

    def launches(recorder):
        kept = []  # addresses are compared: nothing may be freed and used again within a round

        def calls():
            for logits in (aligned, misaligned, transposed, one_column, aligned.double(), aligned):
                for t in (targets, targets.int(), targets[:1].expand(16)):
                    kept.append(fused_select(logits, t, 0.3, state=state, order="score", impl="triton"))
                    kept.append(per_sample_stats(logits, t, impl="triton"))
                kept.append(select_topk(logits[:, 0], 3, impl="triton"))

        return [plain(launch) for launch in recorder(calls)]

    runtime.forget()
    first, direct, dispatched = launches(as_it_runs), launches(as_it_runs), launches(record)
    inputs = {t.data_ptr() for t in (aligned, misaligned, transposed, one_column, targets, state.buffer)}
    for a, b, c in zip(first, direct, dispatched, strict=True):
        assert a[:6] == b[:6] == c[:6]
        for x, y, z in zip(a[6], b[6], c[6], strict=True):
            assert x == y == z or not {x, y, z} & inputs
    assert any(not launch[5].get((0,)) for launch in first), "no launch had a tensor that is not aligned"


def test_threads_share_what_is_remembered():
    logits, targets = cpu_batch(64, 10)
    runtime.forget()
    with ThreadPoolExecutor(8) as pool:

        def work(_):
            return fused_select(logits, targets, 0.3, impl="triton")

        log = []
        with stand_in(log):
            list(pool.map(work, range(400)))
    assert len(log) == 400
    assert len({str(plain(launch)[:6]) for launch in log}) == 1


def test_a_direct_launch_costs_a_fraction_of_a_dispatched_one(monkeypatch):
    launch = probe()
    tensors = (Pointer(), Pointer())
    direct = host_cost(lambda: launch(*tensors, options=(0,)), calls=100, rounds=5)
    monkeypatch.setattr(runtime, "DIRECT", False)
    assert direct < 0.6 * host_cost(lambda: launch(*tensors, options=(0,)), calls=100, rounds=5)
