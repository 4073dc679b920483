"""The compiled extension; everything else about the package is in pyproject.toml.

Without a working compiler the install still succeeds, with a warning, and the package runs its Python implementations.
ADASELECT_REQUIRE_EXTENSION=1 makes that an error; ADASELECT_SANITIZE=address,undefined builds with sanitizers.
"""

import importlib.util
import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.errors import BaseError

SANITIZERS = os.environ.get("ADASELECT_SANITIZE", "")
REQUIRED = os.environ.get("ADASELECT_REQUIRE_EXTENSION", "") not in ("", "0")


# An isolated build environment hides the torch to build against: it is where the package will be installed.
if importlib.util.find_spec("torch") is None:
    site.addsitedir(sysconfig.get_path("purelib"))


def warn(reason: object) -> None:
    print(
        f"WARNING: the C++ extension of adaselect_kernels was not built: {reason}.\n"
        "WARNING: the package will run its slower Python implementations on the CPU. ADASELECT_REQUIRE_EXTENSION=1 makes"
        " this an error.",
        file=sys.stderr,
    )


def compiled() -> dict:
    """The arguments of setup() that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuildExtension(BuildExtension):
        """A failed build of the extension warns instead of failing the install."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (BaseError, RuntimeError, OSError, subprocess.SubprocessError) as error:
                if REQUIRED:
                    raise
                self.extensions.clear()  # nothing to install or to copy in place
                warn(f"it needs a C++17 compiler, and compiling failed ({error})")

    compile_args = [
        "-O3",
        "-fopenmp",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-Wall",
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]
    link_args = ["-fopenmp"]
    if SANITIZERS:
        instrument = [f"-fsanitize={SANITIZERS}", "-fno-omit-frame-pointer"]
        compile_args += [*instrument, "-O1", "-g"]
        link_args += instrument
    extension = CppExtension(
        "adaselect_kernels._C",
        sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").rglob(pattern)),
        define_macros=[("ADASELECT_SANITIZERS", f'"{SANITIZERS}"')],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuildExtension}}


try:
    arguments = compiled()
except ImportError as error:
    if REQUIRED:
        raise
    warn(f"torch must be installed before this package ({error})")
    arguments = {}
setup(**arguments)
