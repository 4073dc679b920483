"""Candidate batches: random images, or those of an .npz file."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.end_to_end.settings import Settings

PAIRS = (("images", "labels"), ("x_train", "y_train"), ("x", "y"), ("data", "labels"))

Batch = tuple[Tensor, Tensor]  # [N, 3, size, size] float32, [N] int64


def batches(settings: Settings, device: torch.device) -> list[Batch]:
    """`settings.pool` candidate batches on the device."""
    n = settings.batch * settings.pool
    if settings.data is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(n, 3, settings.size, settings.size, generator=generator)
        labels = torch.randint(settings.classes, (n,), generator=generator)
    else:
        images, labels = load(settings.data, settings.size, settings.classes)
        if len(labels) < settings.batch:
            raise ValueError(f"{settings.data.name} has {len(labels)} images, a batch needs {settings.batch}")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n]
        images, labels = normalised(images[order]), labels[order]
    whole = len(labels) // settings.batch * settings.batch
    parts = (tensor[:whole].to(device).split(settings.batch) for tensor in (images, labels))
    return list(zip(*parts, strict=True))


def load(path: Path, size: int, classes: int) -> Batch:
    """uint8 images as [N, 3, size, size] uint8 and their labels, from an .npz of uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W].

    The arrays are named as one of PAIRS. Grey images are repeated over the channels, smaller ones padded with zeros.
    Raises FileNotFoundError, or ValueError naming the file: not an .npz, no such arrays, another shape or type, labels
    that disagree in number or lie outside [0, classes).
    """
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with np.load(path) as file:
            pair = next((pair for pair in PAIRS if set(pair) <= set(file.files)), None)
            if pair is None:
                raise ValueError(f"{path.name} has the arrays {sorted(file.files)}; it needs images and labels")
            images, labels = file[pair[0]], file[pair[1]]
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"{path.name}: images must be uint8 [N, H, W], [N, H, W, 3] or [N, 3, H, W], got"
                         f" {images.dtype} {images.shape}")  # fmt: skip
    found = torch.as_tensor(images)
    if found.ndim == 3:
        found = found[:, None].expand(-1, 3, -1, -1)
    elif found.shape[1] != 3 and found.shape[3] == 3:
        found = found.permute(0, 3, 1, 2)
    height, width = found.shape[2:]
    if found.shape[1] != 3 or max(height, width) > size:
        raise ValueError(f"{path.name}: images must have 3 channels and at most {size} x {size}, got {images.shape}")
    above, left = (size - height) // 2, (size - width) // 2
    margins = (left, size - width - left, above, size - height - above)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path.name}: labels must be integers [{len(images)}], got {labels.dtype} {labels.shape}")
    targets = torch.as_tensor(labels.astype(np.int64))
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(
            f"{path.name}: labels must lie in [0, {classes}), got {int(targets.min())} to {int(targets.max())}"
        )
    return torch.nn.functional.pad(found, margins).contiguous(), targets


def normalised(images: Tensor) -> Tensor:
    """float32 with mean 0 and deviation 1 in every channel."""
    values = images.float()
    mean, deviation = values.mean((0, 2, 3), keepdim=True), values.std((0, 2, 3), keepdim=True)
    return (values - mean) / (deviation + 1e-6)
