"""Batches as trees: rows counted, taken, joined and moved, whatever the loader yields.

A tree node is a Mapping, a dataclass instance, a namedtuple, or a list or tuple with a tensor, array or node in it.
A leaf that has rows is a tensor [N, ...], a NumPy array [N, ...], a `Rows`, or a list or tuple of N values that are none
of those (strings, numbers, objects). A leaf without rows (None, a number, a string) belongs to the whole batch and must
be the same in all batches whose rows meet. Anything else is refused, by its path in the tree.
"""

import copy
import dataclasses
import numbers
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Rows(list):
    """A list whose elements are the rows, whatever they are: images of several sizes, dicts of boxes."""


def count_rows(batch: Any) -> int:
    """N, the rows of the leaves that have rows.

    Raises ValueError, naming the paths, for leaves that disagree (the first tensor is right) or when no leaf has rows.
    """
    leaves: list[tuple[str, Any, int]] = []

    def count(path: str, leaf: Any) -> None:
        if _has_rows(path, leaf):
            leaves.append((path, leaf, len(leaf)))

    map_leaves(count, [batch])
    if not leaves:
        raise ValueError(f"a batch needs a tensor, an array or a list with one value a row, got {_describe(batch)}")
    first_path, _, rows = next((entry for entry in leaves if isinstance(entry[1], Tensor)), leaves[0])
    for path, leaf, got in leaves:
        if got != rows:
            hint = "" if isinstance(leaf, (Tensor, Rows)) else "; wrap a list of whole rows in Rows"
            raise ValueError(f"{first_path} has {rows} rows, {path} has {got}{hint}")
    return rows


def take_rows(batch: Any, indices: Tensor) -> Any:
    """A tree of the rows `indices` [k] int64, in new memory.

    Tensors on the device of `indices` are gathered there without a host synchronisation; a leaf that lives elsewhere
    (another device, NumPy, a list) needs the indices there, which waits for them once.
    """
    placed = {indices.device: indices}

    def on(device: torch.device) -> Tensor:
        if device not in placed:
            placed[device] = indices.to(device)
        return placed[device]

    def take(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.index_select(0, on(leaf.device))
        if not _has_rows(path, leaf):
            return leaf
        rows = on(torch.device("cpu")).tolist()
        if _is_array(leaf):
            return leaf[rows]
        return type(leaf)([leaf[row] for row in rows])

    return map_leaves(take, [batch])


def slice_rows(batch: Any, start: int, stop: int) -> Any:
    """A tree of the rows [start, stop); tensors and arrays are views."""

    def part(path: str, leaf: Any) -> Any:
        if not _has_rows(path, leaf):
            return leaf
        rows = leaf[start:stop]
        return type(leaf)(rows) if isinstance(leaf, (list, tuple)) else rows  # a slice of Rows is a plain list

    return map_leaves(part, [batch])


def join_rows(batches: Sequence[Any]) -> Any:
    """A tree of the rows of all `batches`, in their order, in new memory.

    Raises ValueError, naming the path, where trees differ in structure, dtype, device, the shape of a row or a shared leaf.
    """

    def join(path: str, *leaves: Any) -> Any:
        first = leaves[0]
        if not _has_rows(path, first):
            for leaf in leaves[1:]:
                if leaf is not first and leaf != first:
                    raise ValueError(f"{path} has no rows and differs between batches: {first!r} and {leaf!r}")
            return first
        if isinstance(first, Tensor):
            for leaf in leaves[1:]:
                if leaf.shape[1:] != first.shape[1:] or leaf.dtype != first.dtype or leaf.device != first.device:
                    raise ValueError(
                        f"{path}: rows of {_describe(leaf)} cannot join rows of {_describe(first)};"
                        " make the rows of all batches alike (pad to one length), or wrap them in Rows"
                    )
            return torch.cat(leaves)
        if _is_array(first):
            for leaf in leaves[1:]:
                if leaf.shape[1:] != first.shape[1:] or leaf.dtype != first.dtype:
                    raise ValueError(f"{path}: rows of {_describe(leaf)} cannot join rows of {_describe(first)}")
            return sys.modules["numpy"].concatenate(leaves)
        return type(first)([row for leaf in leaves for row in leaf])

    return map_leaves(join, batches)


def move_to(batch: Any, device: torch.device) -> Any:
    """The tree with every tensor on `device`, also those inside `Rows`."""

    def move(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=device.type != "cpu")
        return Rows(map_leaves(move, [row], path) for row in leaf) if isinstance(leaf, Rows) else leaf

    return map_leaves(move, [batch])


def map_leaves(function: Callable[..., Any], trees: Sequence[Any], path: str = "batch") -> Any:
    """The tree of `function(path, *leaves)` over the leaves of trees of one structure."""
    first = trees[0]
    for tree in trees[1:]:
        if type(tree) is not type(first):
            raise ValueError(f"{path} is a {type(first).__name__} in one batch and a {type(tree).__name__} in another")

    def below(name: str, get: Callable[[Any], Any]) -> Any:
        return map_leaves(function, [get(tree) for tree in trees], path + name)

    if isinstance(first, Mapping):
        for tree in trees[1:]:
            if set(tree) != set(first):
                raise ValueError(f"{path} has the keys {list(first)} in one batch and {list(tree)} in another")
        return _like_mapping(first, {key: below(f"[{key!r}]", lambda tree, key=key: tree[key]) for key in first})
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        names = first._fields  # type: ignore[attr-defined]
        return type(first)(*[below(f".{name}", lambda tree, name=name: getattr(tree, name)) for name in names])
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return _like_object(
            first, {name: below(f".{name}", lambda tree, name=name: getattr(tree, name)) for name in names}
        )
    if isinstance(first, (list, tuple)) and not _is_column(first):
        if any(len(tree) != len(first) for tree in trees):
            raise ValueError(f"{path} has lengths {sorted({len(tree) for tree in trees})} in different batches")
        return type(first)([below(f"[{i}]", lambda tree, i=i: tree[i]) for i in range(len(first))])
    return function(path, *trees)


def _is_column(values: Sequence[Any]) -> bool:
    """One value a row: no element is a tensor, an array or a node; or the caller says so."""
    return isinstance(values, Rows) or not any(
        isinstance(value, (Tensor, Mapping, list, tuple)) or _is_array(value) or dataclasses.is_dataclass(value)
        for value in values
    )


def _has_rows(path: str, leaf: Any) -> bool:
    if isinstance(leaf, (list, tuple)):
        return True
    if isinstance(leaf, Tensor) or _is_array(leaf):
        if leaf.ndim == 0:
            raise ValueError(f"{path} has no rows: a tensor must be [N, ...], got a scalar")
        return True
    if leaf is None or isinstance(leaf, (numbers.Number, str, bytes)):
        return False
    raise ValueError(f"{path}: cannot take rows of a {type(leaf).__name__}; give a tensor, an array, a list or Rows")


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # an array cannot exist before numpy is imported
    return numpy is not None and isinstance(value, numpy.ndarray)


def _like_mapping(template: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if type(template) is dict:
        return values
    if not isinstance(template, MutableMapping):
        return type(template)(values)  # type: ignore[call-arg]
    filled = copy.copy(template)  # keeps what else the class carries: a default factory, an encoding
    for key, value in values.items():
        filled[key] = value
    return filled


def _like_object(template: Any, values: dict[str, Any]) -> Any:
    filled = copy.copy(template)  # no __init__ or __post_init__ for rows of what was made already
    for name, value in values.items():
        object.__setattr__(filled, name, value)  # also when frozen
    return filled


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}"
    return f"{leaf.dtype} {leaf.shape}" if _is_array(leaf) else type(leaf).__name__
