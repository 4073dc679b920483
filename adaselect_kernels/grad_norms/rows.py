"""Tensors by sample: moves the sample axis to the front, and takes one sample out of a tensor."""

import math

import torch
from torch import Tensor

from adaselect_kernels.grad_norms.layout import LEADING, Layout


class Rows:
    """`count` rows of a batch and the sample each belongs to: its own, or what `sample_ids` [count] says."""

    def __init__(self, count: int, sample_ids: Tensor | None) -> None:
        self.count = count
        self.samples = count
        self._ids = sample_ids
        if sample_ids is not None:
            sizes = torch.bincount(sample_ids)
            self.samples = len(sizes)
            # padded[i]: the rows of sample i, then -1
            places = torch.arange(int(sizes.max()) if len(sizes) else 0, device=sample_ids.device)
            order = torch.argsort(sample_ids, stable=True)
            first = sizes.cumsum(0) - sizes
            at = (first[:, None] + places).clamp(max=max(count - 1, 0))
            self._padded = torch.where(places < sizes[:, None], order[at], -1)

    def by_sample(self, tensor: Tensor, layout: Layout) -> Tensor:
        """[samples, F, ...]: F positions of a sample that stood along its axis, then the other dimensions in order."""
        if layout == LEADING and self._ids is None:
            return tensor.unsqueeze(1)
        split = tensor.unflatten(layout.dim, (layout.outer, self.count, layout.inner))
        rows = split.movedim((layout.dim + 1, layout.dim, layout.dim + 2), (0, 1, 2)).flatten(1, 2)
        if self._ids is None:
            return rows
        found = rows[self._padded.clamp(min=0)]
        there = (self._padded >= 0).view(*self._padded.shape, *[1] * (rows.dim() - 1))
        return (found * there).flatten(1, 2)

    def positions(self, tensor: Tensor, layout: Layout, trailing: int = 1) -> Tensor:
        """[samples, P, F]: all positions of a sample together, and the last `trailing` dimensions as F features."""
        leading = layout == LEADING and self._ids is None
        found = tensor if leading else self.by_sample(tensor, layout)
        shape, split = found.shape, found.dim() - trailing
        if len(shape) == 3 and split == 2:
            return found
        return found.reshape(shape[0], math.prod(shape[1:split]), math.prod(shape[split:]))

    def one(self, tensor: Tensor, layout: Layout, sample: int) -> Tensor:
        """The tensor with the axis cut down to one sample: what the function would have been given for it alone."""
        split = tensor.unflatten(layout.dim, (layout.outer, self.count, layout.inner))
        return split.index_select(layout.dim + 1, self._of(sample, tensor.device)).flatten(layout.dim, layout.dim + 2)

    def put(self, tensor: Tensor, layout: Layout, sample: int, part: Tensor) -> None:
        """Write what `one` would cut out."""
        split = tensor.unflatten(layout.dim, (layout.outer, self.count, layout.inner))
        split.index_copy_(
            layout.dim + 1,
            self._of(sample, tensor.device),
            part.unflatten(layout.dim, (layout.outer, -1, layout.inner)),
        )

    def _of(self, sample: int, device: torch.device) -> Tensor:
        """The sample's rows."""
        if self._ids is None:
            return torch.tensor([sample], device=device)
        return (self._ids == sample).nonzero()[:, 0]
