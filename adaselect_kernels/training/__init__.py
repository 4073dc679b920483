"""Training with selection: the scoring pass, and full batches of chosen samples from any loader."""

from adaselect_kernels.training.batches import Rows
from adaselect_kernels.training.refill import Counts, Seconds, SelectedBatches
from adaselect_kernels.training.scorers import Scorer, get_scorer
from adaselect_kernels.training.scoring import score, scoring_pass

__all__ = ["Counts", "Rows", "Scorer", "Seconds", "SelectedBatches", "get_scorer", "score", "scoring_pass"]
