"""Every group of `python -m benchmarks`, in the order they run."""

from benchmarks import micro
from benchmarks.end_to_end import group as end_to_end
from benchmarks.linear import group as linear
from benchmarks.micro.case import Group

GROUPS: dict[str, Group] = micro.GROUPS | {group.GROUP.name: group.GROUP for group in (linear, end_to_end)}
