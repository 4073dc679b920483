"""Per-sample gradient norms of a model against a plain forward and backward, and against the peers.

Contenders: ours (weight_gradients="plain"), ours_fused and ours_none (the scoring mode); plain (forward and backward without
norms); loop (one backward a sample); vmap (torch.func, every sample's gradient stored); opacus (ghost norms) and backpack,
where they are installed. Each call is a whole step: forward, backward, norms.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import gate, timing
from benchmarks.grad_norms import peers
from benchmarks.grad_norms.models import Task, image_task, one_backward_a_sample, text_task
from benchmarks.micro.case import Case, Contender, Group, Unavailable
from benchmarks.timing import Prepared

CHECKED = 3  # samples of the gate's batch
PEER_ERROR, HALF_ERROR = 1e-3, 1e-2  # relative, of a peer; of anything under bfloat16
OURS_ERROR = 1e-6  # beyond twice what one float32 backward a sample errs


def check_norms(step: peers.Step, task: Task, *, peer: bool) -> gate.Report:
    """Largest relative error of a sample's norm against one float64 backward a sample."""
    (found,) = step()
    expected = one_backward_a_sample(task, torch.float64)
    error = ((found.double() - expected).abs() / expected).max().item()
    if task.autocast:
        allowed = HALF_ERROR
    elif peer:
        allowed = PEER_ERROR
    else:
        own = ((one_backward_a_sample(task, torch.float32) - expected).abs() / expected).max().item()
        allowed = OURS_ERROR + 2 * own
    if not error <= allowed:
        raise gate.GateError(f"norms: relative error {error:.3g}, allowed {allowed:.3g}")
    return {"norms": error}


def available(name: str, function: Callable[[Task], peers.Step]) -> Callable[[Task], peers.Step]:
    """The optional peer, Unavailable where its library is missing or has no rule for the model."""

    def guarded(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except ImportError:
            raise Unavailable(f"{name} is not installed") from None
        except NotImplementedError as error:
            raise Unavailable(f"{name} has no rule for this model: {timing.describe_error(error)}") from None

    return lambda task: partial(guarded, guarded(function, task))


def contenders(
    make: Callable[[torch.device], Task], quick: bool, device: torch.device, buffers: int
) -> list[Contender]:
    """One batch whatever `buffers`: a step moves more than any cache holds."""
    task = make(device)
    checked = task.first(CHECKED)

    def contender(name: str, role: str, function: Callable[[Task], peers.Step]) -> Contender:
        return Contender(
            name,
            role,
            lambda: Prepared([function(task)]),
            lambda: check_norms(function(checked), checked, peer=role == "peer"),
        )

    found = [contender(name, "ours", partial(peers.ours, mode=mode)) for name, mode in peers.OURS.items()]
    found.append(Contender("plain", "peer", lambda: Prepared([peers.plain(task)])))
    others = dict(peers.PEERS)
    if not quick:  # which proves the suite with what is installed everywhere
        others |= {name: available(name, function) for name, function in peers.OPTIONAL.items()}
    return [*found, *(contender(name, "peer", function) for name, function in others.items())]


def model_case(name: str, n: int, make: Callable[[torch.device], Task], quick: bool, **params: int | str) -> Case:
    task = make(torch.device("meta"))
    parameter_bytes = sum(p.numel() * p.element_size() for p in task.model.parameters())
    return Case(
        name=name,
        params={"n": n, "parameters": parameter_bytes // 4, **params},
        input_bytes=task.inputs.numel() * task.inputs.element_size(),
        min_bytes=3 * parameter_bytes,  # read forward and backward, their gradients written
        build=partial(contenders, make, quick),
    )


def image_case(n: int, quick: bool, width: int = 64, blocks: int = 2, size: int = 32) -> Case:
    make = partial(image_task, n, width, blocks, size)
    return model_case(f"resnet18 N={n}", n, make, quick, dtype="float32")


def text_case(n: int, length: int, d: int, depth: int, vocabulary: int, quick: bool, autocast: bool = False) -> Case:
    make = partial(text_task, n, length, d, depth, vocabulary, autocast)
    dtype = "bfloat16" if autocast else "float32"
    return model_case(
        f"transformer N={n} T={length} d={d} {dtype}", n, make, quick, length=length, d=d, depth=depth, dtype=dtype
    )


def cases(device: torch.device, quick: bool) -> Sequence[Case]:
    if quick:
        return [image_case(4, True, width=8, blocks=1, size=8), text_case(4, 5, 8, 1, 11, True)]
    found = [image_case(32, False), *(text_case(32, length, 256, 4, 1000, False) for length in (64, 128))]
    found += [text_case(16, length, 512, 4, 1000, False) for length in (64, 128)]
    if device.type == "cuda":
        found += [image_case(128, False)]
        found += [
            text_case(8, length, 1024, 4, 1000, False, half) for length in (512, 1024, 2048) for half in (False, True)
        ]
    return found


GROUP = Group(
    "grad_norms",
    "Per-sample gradient norms of a model",
    cases,
    weight=4.0,
    memory=True,
    families=("grad_norms",),
)
