"""Where the forms of per-sample gradient norms cross on this CPU: `python -m benchmarks.crossover_cpu`.

Times the direct form, the Gram form, Winograd's of 3 x 3 convolutions of stride 1, weight gradient and norms together
("fused") and PyTorch's weight gradient of the batch alone, in turns, over layers of T positions, d inputs and p features,
and over the convolutions of a ResNet-18 for 32 x 32 images. One thread: samples are shared out, so the forms cross at the
same place for any number of threads, and the time of a thread is what other work on the machine disturbs least. The table
says which form "auto" takes and what that costs over the best one (T = 1 has one form, timed twice); the constants of the
cost model in csrc/cpu/grad_norms_layers.cpp are set so that the last column stays at 1. Written to
results/<device>/grad_norm_crossover.json in the format of records.py.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import records, timing

FORMS = ("direct", "gram", "winograd")
POSITIONS = (1, 4, 16, 64, 256, 1024)
FEATURES = ((64, 64), (256, 256), (768, 768), (768, 3072))
# channels, features, image, kernel, stride of ResNet-18 for 32 x 32 images
CONVOLUTIONS = (
    (3, 64, 32, 3, 1),
    (64, 64, 32, 3, 1),
    (64, 128, 32, 3, 2),
    (64, 128, 32, 1, 2),
    (128, 128, 16, 3, 1),
    (128, 256, 16, 3, 2),
    (256, 256, 8, 3, 1),
    (256, 512, 8, 3, 2),
    (512, 512, 4, 3, 1),
)
SAMPLES = 8
COLUMNS = ("case", *FORMS, "fused", "weight gradient", "auto", "auto over best")


def linear(kernels: Any, t: int, d: int, p: int) -> tuple[dict[str, Callable[[], Any]], str]:
    a, g = torch.randn(SAMPLES, t, d), torch.randn(SAMPLES, t, p)
    calls: dict[str, Callable[[], Any]] = {
        form: partial(kernels.linear_grad_sq_norms, a, g, True, False, form) for form in FORMS[:2]
    }
    calls["fused"] = lambda: kernels.linear_grads_and_sq_norms(a, g, False)
    calls["weight gradient"] = lambda: g.flatten(0, 1).mT @ a.flatten(0, 1)
    return calls, kernels.linear_grad_form(a, g)


def convolution(
    kernels: Any, c: int, p: int, image: int, k: int, stride: int
) -> tuple[dict[str, Callable[[], Any]], str]:
    padding = k // 2
    x, out = torch.randn(SAMPLES, c, image, image), (image + 2 * padding - k) // stride + 1
    g, weight = torch.randn(SAMPLES, p, out, out), torch.randn(p, c, k, k)
    options = ([k, k], [stride, stride], [padding, padding], [1, 1], 1)
    calls: dict[str, Callable[[], Any]] = {
        form: partial(kernels.conv_grad_sq_norms, x, g, *options, True, False, form)
        for form in (FORMS if (k, stride) == (3, 1) else FORMS[:2])
    }
    calls["weight gradient"] = lambda: torch.ops.aten.convolution_backward(
        g, x, weight, None, *options[1:4], False, [0, 0], 1, [False, True, False]
    )
    return calls, kernels.conv_grad_form(x, g, *options)


def interleave(calls: dict[str, Callable[[], Any]], budget_s: float) -> dict[str, list[float]]:
    """Seconds of the thread a call, in the order of the rounds."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    done = 0
    while done < timing.MIN_ROUNDS or (done < timing.MAX_ROUNDS and sum(map(sum, taken.values())) < budget_s):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            taken[name].append(time.thread_time() - start)
        done += 1
    return taken


def measure(
    case: str, params: dict[str, Any], calls: dict[str, Callable[[], Any]], auto: str, budget_s: float
) -> list[dict[str, Any]]:
    """One record a contender; its ratio is over the form that "auto" takes, within each round."""
    taken = interleave(calls, budget_s)
    found = []
    for name, samples in taken.items():
        found.append(
            {
                "case": case,
                "params": params | {"samples": SAMPLES, "auto": auto},
                "contender": name,
                "role": "peer" if name == "weight gradient" else "ours",
                "status": "measured",
                "reason": None,
                "us": {key: round(us * 1e6, 3) for key, us in timing.spread(samples).items()},
                "samples_us": [round(s * 1e6, 3) for s in samples],
                "inner": 1,
                "cache": "warm",
                "ratio": {key: round(ratio, 4) for key, ratio in timing.paired_ratio(samples, taken[auto]).items()},
            }
        )
    return found


def row(found: list[dict[str, Any]]) -> str:
    us = {record["contender"]: record["us"]["p50"] for record in found}
    auto = found[0]["params"]["auto"]
    times = [f"{us[name]:,.0f}" if name in us else "" for name in (*FORMS, "fused", "weight gradient")]
    best = min(us[form] for form in FORMS if form in us)
    return f"| {' | '.join([found[0]['case'], *times, auto, f'{us[auto] / best:.2f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="of timed rounds a case, default 0.5")
    seconds = parser.parse_args().seconds
    kernels = records.dispatch.EXTENSION
    if kernels is None:
        sys.exit(records.dispatch.EXTENSION_ERROR)
    torch.set_num_threads(1)
    device, began, everything = torch.device("cpu"), time.monotonic(), []
    environment, hashes = records.environment(device), records.kernel_hashes("cpu", ())
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for d, p in FEATURES:
        for t in POSITIONS:
            params = {"T": t, "d": d, "p": p}
            found = measure(f"linear T={t} d={d} p={p}", params, *linear(kernels, t, d, p), seconds)
            print(row(found), flush=True)
            everything += found
    for c, p, image, k, stride in CONVOLUTIONS:
        params = {"channels": c, "features": p, "image": image, "kernel": k, "stride": stride}
        case = f"conv {c} to {p}, {image} x {image}, kernel {k}, stride {stride}"
        found = measure(case, params, *convolution(kernels, c, p, image, k, stride), seconds)
        print(row(found), flush=True)
        everything += found
    document = {
        "format": records.FORMAT,
        "group": "grad_norm_crossover",
        "title": "Forms of per-sample gradient norms, us for 8 samples",
        "command": "python -m benchmarks.crossover_cpu",
        "quick": False,
        "complete": True,
        "seconds": round(time.monotonic() - began, 1),
        "implementation": "cpu",
        "environment": environment,
        "kernels": hashes,
        "records": everything,
        "fits": [],
    }
    records.write(records.RESULTS / records.device_slug(device) / "grad_norm_crossover.json", document)


if __name__ == "__main__":
    main()
