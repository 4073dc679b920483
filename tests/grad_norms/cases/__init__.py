"""Every case, in the order of the matrix."""

from tests.grad_norms.cases import attention, layers, mixing, parameters, sequences, training
from tests.grad_norms.problem import CASES

__all__ = ["CASES", "attention", "layers", "mixing", "parameters", "sequences", "training"]
