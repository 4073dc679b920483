"""Under DistributedDataParallel the norms are those of the process's own samples; gradients are averaged as without us."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adaselect_kernels import PerSampleGradNorm
from tests.grad_norms.problem import wave

MODES = ("plain", "fused", "none")
PROCESSES = 2

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def one_backward_a_sample(plain: nn.Module, x: torch.Tensor) -> torch.Tensor:
    plain, norms = copy.deepcopy(plain).double(), []
    for sample in x.double().split(1):
        plain.zero_grad()
        wave(plain(sample)).backward()
        norms.append(sum(p.grad.square().sum() for p in plain.parameters()))
    return torch.stack(norms).sqrt()


def worker(rank: int, processes: int, seed: int, folder: str) -> None:
    """Saves what each mode gives, beside what it must be."""
    dist.init_process_group("gloo", rank=rank, world_size=processes, init_method=f"file://{folder}/store")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start = model()
    torch.manual_seed(seed + 1 + rank)
    batches = [torch.randn(5, 4) for _ in range(2)]
    found = {}
    for mode in MODES:
        for name in ("wrapper", "module"):
            ours, plain = (DistributedDataParallel(copy.deepcopy(start)) for _ in range(2))
            totals = []
            for x in batches:  # the gradients of the second are added to those of the first
                with PerSampleGradNorm(ours if name == "wrapper" else ours.module, weight_gradients=mode) as norms:
                    wave(ours(x)).backward()
                totals.append(norms.total())
                wave(plain(x)).backward()
            unwritten = [p.grad is None for p in ours.parameters()]
            if mode == "none":  # a training step after it finds the reducer ready
                for x in batches:
                    wave(ours(x)).backward()
            pairs = [(p.grad, q.grad) for p, q in zip(ours.parameters(), plain.parameters(), strict=True)]
            found[mode, name] = totals, unwritten, pairs
    torch.save((found, [one_backward_a_sample(start, x) for x in batches]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def check(folder: Path, processes: int) -> None:
    averaged = []
    for rank in range(processes):
        found, expected = torch.load(folder / f"{rank}.pt")
        assert set(found) == {(mode, name) for mode in MODES for name in ("wrapper", "module")}
        for (mode, _), (totals, unwritten, pairs) in found.items():
            for total, oracle in zip(totals, expected, strict=True):
                assert ((total.double() - oracle).abs() <= 2e-6 * oracle).all()
            assert unwritten == [mode == "none"] * len(pairs)
            for ours, plain in pairs:
                assert (
                    torch.equal(ours, plain) if mode != "fused" else torch.allclose(ours, plain, rtol=1e-5, atol=1e-6)
                )
        averaged.append(found["plain", "wrapper"][2][0][0])
    assert all(torch.equal(gradient, averaged[0]) for gradient in averaged)


def test_one_process(generator, tmp_path):
    worker(0, 1, int(torch.randint(1 << 30, (), generator=generator)), str(tmp_path))
    check(tmp_path, 1)


def test_two_processes(generator, tmp_path):
    seed = int(torch.randint(1 << 30, (), generator=generator))
    torch.multiprocessing.spawn(worker, (PROCESSES, seed, str(tmp_path)), nprocs=PROCESSES)
    check(tmp_path, PROCESSES)
