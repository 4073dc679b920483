"""Samplers: which rows to load at all, chosen before any forward; batch samplers for any DataLoader."""

import importlib
import inspect
from collections.abc import Sized
from typing import Any

from adaselect_kernels.samplers.sampler import BatchSampler, OrderedSampler

SAMPLERS = {  # name: (module, class); imported when asked for
    "uniform": ("uniform", "UniformSampler"),
    "rs2": ("uniform", "RS2"),
    "impon": ("impon", "IMPON"),
    "p_sgd": ("chang", "PSGD"),
    "c_sgd": ("chang", "CSGD"),
    "infobatch": ("infobatch", "InfoBatch"),
    "dynams": ("dynams", "DynaMS"),
}


def get_sampler(name: str, rows: int | Sized, batch_size: int, **config: Any) -> BatchSampler:
    """The sampler `name` over a training set of `rows` rows: `DataLoader(dataset, batch_sampler=get_sampler(...))`.

    name: "uniform", "rs2", "impon", "p_sgd", "c_sgd", "infobatch" or "dynams".
    rows: number of rows of the training set, or the dataset itself where it has a length.
    config: of every sampler seed and drop_last; the others are those of the classes, `SAMPLERS` names them.

    Raises ValueError (unknown name, a value outside what is accepted), TypeError (unknown setting, wrong type, a dataset
    without a length).

    >>> sampler = get_sampler("rs2", rows=10, batch_size=2, gamma=0.4)
    >>> [len(batch) for batch in sampler]
    [2, 2]
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        hint = ""
        if isinstance(name, str):
            from adaselect_kernels.policies import POLICIES

            if name in POLICIES:
                hint = f"; {name!r} is a policy: it chooses after a scoring forward, use policies.get_policy"
        raise ValueError(f"name must be one of {', '.join(map(repr, SAMPLERS))}; got {name!r}{hint}")
    module, class_name = SAMPLERS[name]
    sampler: type[BatchSampler] = getattr(importlib.import_module(f"adaselect_kernels.samplers.{module}"), class_name)
    accepted = [name for name in inspect.signature(sampler).parameters if name not in ("rows", "batch_size")]
    unknown = [setting for setting in config if setting not in accepted]
    if unknown:
        raise TypeError(
            f"the sampler {name!r} has no setting {', '.join(map(repr, unknown))}; it accepts {', '.join(accepted)}"
        )
    return sampler(rows, batch_size, **config)


__all__ = ["SAMPLERS", "BatchSampler", "OrderedSampler", "get_sampler"]
