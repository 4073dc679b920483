"""The compiled extension; everything else about the package is in pyproject.toml.

Without a working compiler the install still succeeds, with a warning, and the package runs its Python implementations.
ADASELECT_REQUIRE_EXTENSION=1 makes that an error; ADASELECT_SANITIZE=address,undefined builds with sanitizers.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.errors import BaseError
from torch.utils.cpp_extension import BuildExtension, CppExtension

SANITIZERS = os.environ.get("ADASELECT_SANITIZE", "")
REQUIRED = os.environ.get("ADASELECT_REQUIRE_EXTENSION", "") not in ("", "0")


class OptionalBuildExtension(BuildExtension):
    """A failed build of the extension warns instead of failing the install."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (BaseError, RuntimeError, OSError) as error:
            if REQUIRED:
                raise
            self.extensions.clear()  # nothing to install or to copy in place
            print(
                f"WARNING: the C++ extension of adaselect_kernels did not build ({error}).\n"
                "WARNING: the package will run its slower Python implementations on the CPU. Install a C++17 compiler and"
                " set ADASELECT_REQUIRE_EXTENSION=1 to see the build fail loudly.",
                file=sys.stderr,
            )


def extension() -> CppExtension:
    compile_args = ["-O3", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    link_args = ["-fopenmp"]
    if SANITIZERS:
        instrument = [f"-fsanitize={SANITIZERS}", "-fno-omit-frame-pointer"]
        compile_args += [*instrument, "-O1", "-g"]
        link_args += instrument
    return CppExtension(
        "adaselect_kernels._C",
        sources=sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").rglob(pattern)),
        define_macros=[("ADASELECT_SANITIZERS", f'"{SANITIZERS}"')],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": OptionalBuildExtension})
