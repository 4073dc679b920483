"""The compiled extension; everything else about the package is in pyproject.toml.

Without a working compiler the install still succeeds, with a warning, and the package runs its Python implementations.
ADASELECT_REQUIRE_EXTENSION=1 makes that an error; ADASELECT_SANITIZE=address,undefined builds with sanitizers.

The CUDA kernels are an extension of their own: built where CUDA_HOME and a CUDA build of torch are found, whether or not
a GPU is; ADASELECT_CUDA=1 makes their absence an error, ADASELECT_CUDA=0 leaves them out.
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
CUDA = os.environ.get("ADASELECT_CUDA", "")
CUDA_EXTENSION = "adaselect_kernels._cuda"


# An isolated build environment hides the torch to build against: it is where the package will be installed.
if importlib.util.find_spec("torch") is None:
    site.addsitedir(sysconfig.get_path("purelib"))


def warn(
    reason: object,
    what: str = "C++ extension of adaselect_kernels was",
    instead: str = "its slower Python implementations on the CPU. ADASELECT_REQUIRE_EXTENSION=1",
) -> None:
    print(
        f"WARNING: the {what} not built: {reason}.\nWARNING: the package will run {instead} makes this an error.",
        file=sys.stderr,
    )


def compiled() -> dict:
    """The arguments of setup() that build the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuildExtension(BuildExtension):
        """A failed build of an extension warns instead of failing the install."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (BaseError, RuntimeError, OSError, subprocess.SubprocessError) as error:
                if CUDA != "1" and (cuda := [ext for ext in self.extensions if ext.name == CUDA_EXTENSION]):
                    self.extensions.remove(cuda[0])
                    warn(
                        error,
                        "CUDA kernels of adaselect_kernels were",
                        "its Triton kernels on the GPU. ADASELECT_CUDA=1",
                    )
                    return self.build_extensions()
                if REQUIRED or CUDA == "1":
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
        sources=["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").rglob("*.cpp"))],
        depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").rglob(pattern)),
        define_macros=[("ADASELECT_SANITIZERS", f'"{SANITIZERS}"')],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    return {"ext_modules": [extension, *cuda_extension()], "cmdclass": {"build_ext": OptionalBuildExtension}}


def cuda_extension() -> list:
    """The extension of csrc/cuda, or none where it is not to be built; RuntimeError where ADASELECT_CUDA=1 asks in vain."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if CUDA not in ("", "0", "1"):
        raise RuntimeError(f"ADASELECT_CUDA must be 0, 1 or unset, got {CUDA!r}")
    missing = [
        what
        for what, found in (("a CUDA build of torch", torch.version.cuda), ("CUDA_HOME (a CUDA toolkit)", CUDA_HOME))
        if not found
    ]
    if CUDA == "1" and missing:
        raise RuntimeError(f"ADASELECT_CUDA=1 needs {' and '.join(missing)}")
    if CUDA == "0" or missing:
        return []
    assert torch.version.cuda is not None
    # what a toolkit knows is decided by its version, not by the GPU at hand; nvcc knows sm_100 from 12.8 on
    blackwell = tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 8)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if blackwell else "8.0;9.0+PTX")
    return [
        CUDAExtension(
            CUDA_EXTENSION,
            sources=sorted(str(path) for pattern in ("*.cpp", "*.cu") for path in Path("csrc/cuda").rglob(pattern)),
            depends=sorted(str(path) for path in Path("csrc/cuda").rglob("*.h")),
            extra_compile_args={"cxx": ["-O3"], "nvcc": ["-O3"]},
        )
    ]


try:
    arguments = compiled()
except ImportError as error:
    if REQUIRED:
        raise
    warn(f"torch must be installed before this package ({error})")
    arguments = {}
setup(**arguments)
