"""The demo: a small CNN on handwritten digits, with and without selection, measured and drawn. No GPU, no network.

Needs the packages of the `demo` extra: rich, matplotlib, scikit-learn.
"""

from adaselect_kernels.demo.config import DemoConfig
from adaselect_kernels.demo.session import run

__all__ = ["DemoConfig", "run"]
