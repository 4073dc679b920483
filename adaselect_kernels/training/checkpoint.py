"""Checkpoints that are whole: replaced in one step, with a digest of all their values, and the random streams of a run."""

import hashlib
import io
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaselect_kernels.training.files import replace_file

_DIGEST = "digest"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` with a digest of its values, or nothing; `torch.load(path, weights_only=True)` reads it too.

    Raises TypeError, naming the place, for what could not be loaded again: only tensors, dicts, lists, tuples, numbers,
    strings and None can.
    """
    whole = {**state, _DIGEST: _digest(state)}
    file = io.BytesIO()
    torch.save(whole, file)

    def write(to: Any) -> None:
        to.write(file.getbuffer())
        to.flush()
        os.fsync(to.fileno())

    replace_file(path, write)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU. Raises ValueError for any other file, or one that was damaged."""
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            digest = state.pop(_DIGEST)
            damaged = digest != _digest(state)
        except Exception as error:
            raise ValueError(f"{path} is no checkpoint, or a damaged one: {type(error).__name__}: {error}") from error
    if damaged:
        raise ValueError(f"{path} is damaged: its values do not give the digest it was written with")
    return state


def remove_leftovers(path: Path) -> None:
    """Temporary files of processes that were killed while they wrote `path`."""
    for file in path.parent.glob(f".{path.name}.*"):
        if file.suffix[1:].isdigit() and file.suffix[1:] != str(os.getpid()):
            file.unlink(missing_ok=True)


def random_streams() -> dict[str, Any]:
    """States of the global streams: torch on the CPU and on CUDA, Python's random, NumPy's when imported."""
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    numpy_state = None
    if numpy is not None:
        kind, keys, *rest = numpy.get_state()
        numpy_state = [kind, torch.tensor(keys.astype("int64")), *rest]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [python[0], list(python[1]), python[2]],
        "numpy": numpy_state,
    }


def set_random_streams(states: Mapping[str, Any]) -> None:
    """Continue with `random_streams()`; errors of the libraries for what is no state."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = sys.modules.get("numpy.random")
    if numpy is not None and states["numpy"] is not None:
        kind, keys, *rest = states["numpy"]
        numpy.set_state((kind, keys.numpy().astype("uint32"), *rest))


def _digest(state: Any) -> str:
    digest = hashlib.sha256()

    def add(path: str, value: Any) -> None:
        digest.update(f"{path}: ".encode())
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"{len(value)} keys".encode())
            for key, inner in value.items():
                add(f"{path}[{key!r}]", inner)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} values".encode())
            for i, inner in enumerate(value):
                add(f"{path}[{i}]", inner)
        elif value is None or isinstance(value, (bool, int, float, str, bytes)):
            digest.update(repr(value).encode())
        else:
            raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold and load again")

    add("checkpoint", state)
    return digest.hexdigest()
