"""Training with selection: the scoring pass, and full batches of chosen samples from any loader."""

from adaselect_kernels.training.batches import Rows
from adaselect_kernels.training.planner import Plan, PlanWarning, plan
from adaselect_kernels.training.refill import Counts, Seconds, SelectedBatches
from adaselect_kernels.training.schedules import ScheduleWarning, check_schedule, planned_updates, scale_schedule
from adaselect_kernels.training.scorers import Scorer, get_scorer
from adaselect_kernels.training.scoring import score, scoring_pass
from adaselect_kernels.training.trainer import Trainer

__all__ = [
    "Counts",
    "Plan",
    "PlanWarning",
    "Rows",
    "ScheduleWarning",
    "Scorer",
    "Seconds",
    "SelectedBatches",
    "Trainer",
    "check_schedule",
    "get_scorer",
    "plan",
    "planned_updates",
    "scale_schedule",
    "score",
    "scoring_pass",
]
