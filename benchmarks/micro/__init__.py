"""Micro benchmarks: the groups, in the order they run."""

from benchmarks.micro import bank_select, fused_select, grad_norms, growth, per_sample_stats, select_topk
from benchmarks.micro.case import Group

GROUPS: dict[str, Group] = {
    module.GROUP.name: module.GROUP
    for module in (fused_select, per_sample_stats, select_topk, growth, grad_norms, bank_select)
}
