"""Every case, in the order of the matrix."""

from tests.grad_norms.cases import attention, layers, mixing, parameters, reductions, sequences, training
from tests.grad_norms.problem import CASES

ORDER = [module.__name__ for module in (layers, sequences, attention, parameters, reductions, training, mixing)]
CASES.sort(key=lambda case: ORDER.index(case.build.__module__ if case.build.__module__ in ORDER else ORDER[0]))

__all__ = ["CASES"]
