"""csrc/cuda without a GPU: it compiles for every target within its registers, and what a thread does equals the oracle.

The functions that a thread runs are compiled for the host too, and run there one thread after another.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from adaselect_kernels import dispatch, reference
from tests.oracle import assert_within_budget

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
TARGETS = ("sm_80", "sm_90", "sm_100")
# Two blocks of 256 threads, or one of 1024, on a multiprocessor with 65,536 registers.
REGISTER_LIMITS = {"sort_kernel": 64, "segments_kernel": 128, "combine_kernel": 128}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: the CUDA sources are not compiled")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: device code is not run on the host")


def compile_cuda(source: Path, target: str, tmp_path: Path) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes a thread of every kernel, by its mangled name."""
    command = [NVCC, "-std=c++17", "-O3", f"-arch={target}", "-Xptxas=-v", "-Werror=all-warnings", "-c", source]
    done = subprocess.run([*command, "-o", tmp_path / "out.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return {name: (int(registers), int(stack) + int(stores)) for name, stack, stores, _, registers in found}


def too_heavy(kernels: dict[str, tuple[int, int]], limits: dict[str, int]) -> list[str]:
    wrong = []
    for name, (registers, spilled) in kernels.items():
        limit = next((limit for known, limit in limits.items() if known in name), 0)
        if spilled or registers > limit:
            wrong.append(f"{name}: {registers} registers of {limit}, {spilled} bytes spilled")
    return wrong


@needs_nvcc
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", sorted(SOURCES.rglob("*.cu")), ids=lambda path: path.name)
def test_a_source_compiles_without_spills(source, target, tmp_path):
    kernels = compile_cuda(source, target, tmp_path)
    assert {known for known in REGISTER_LIMITS if any(known in name for name in kernels)} == set(REGISTER_LIMITS)
    assert too_heavy(kernels, REGISTER_LIMITS) == []


@needs_nvcc
def test_a_kernel_that_spills_is_caught(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text("""
        __global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* out) {
          float kept[64];
          for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = kept[i] * kept[63 - i];
        }
        __global__ void small_kernel(float* out) { out[threadIdx.x] = 1.0f; }
    """)
    kernels = compile_cuda(source, "sm_90", tmp_path)
    limits = {"spilling_kernel": 255, "small_kernel": 255}
    assert [wrong.split(":")[0] for wrong in too_heavy(kernels, limits)] == [n for n in kernels if "spilling" in n]
    assert len(too_heavy(kernels, {"spilling_kernel": 255, "small_kernel": 1})) == 2


@needs_compiler
def test_the_registering_layer_compiles_against_this_torch():
    from torch.utils.cpp_extension import include_paths

    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    command = [COMPILER, "-std=c++20", "-fsyntax-only", *includes, SOURCES / "register.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- Triton's asynchronous copies -------------------------------------------------------------------------------------


def copied_bytes(name: str, cache: Path, monkeypatch) -> set[int]:
    """Sizes of the asynchronous copies from global to shared memory of a kernel compiled for Hopper, in a fresh cache."""
    pytest.importorskip("triton")
    from benchmarks import aot

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    entry = aot.find(("grad_norms", "sm_90", name))
    ptx = aot.triton.compile(aot.source(entry), target=aot.TARGETS["sm_90"], options=aot.options(entry)).asm["ptx"]
    assert list(cache.iterdir())
    return {int(size, 16) for size in re.findall(r"cp\.async\.c\w\.shared\.global [^;]*?, (0x\w+)", ptx)}


@pytest.mark.parametrize("entry", ["fused-bf16-ieee-4096-roomy", "direct-fp32-ieee-4096", "gram-bf16-T64"])
def test_aligned_linear_layers_are_copied_16_bytes_at_a_time(entry, tmp_path, monkeypatch):
    assert copied_bytes(entry, tmp_path, monkeypatch) == {16}


def test_a_narrow_copy_is_seen(tmp_path, monkeypatch):
    """Unaligned positions of a convolution, 4 bytes at a time."""
    assert copied_bytes("direct-conv1d-t-last-fp32", tmp_path, monkeypatch) == {4}


# --- the algorithm, on the host ---------------------------------------------------------------------------------------

HARNESS = """
#include "embedding_norms.h"
#include <vector>

using namespace adaselect::cuda;

namespace {

template <int kWidth, bool kPacked, class T>
double sq_norm(const int64_t* ids, const int32_t* positions, int32_t count, const T* grads, int64_t channels,
               int64_t stride_row, int64_t stride_channel, int64_t padding_idx) {
  Compute<T> total = 0;
  const int32_t share = (count + kWarps - 1) / kWarps;
  for (int64_t c = 0; c < channels; c += kWidth)
    for (int32_t from = 0; from < count; from += share)
      total += segments_sq_norm<kWidth, kPacked>(
          Sample<T>{ids, positions, count, grads + c * stride_channel, stride_row, stride_channel, padding_idx}, from,
          from + share);
  return total;
}

template <class T>
double either(bool packed, const int64_t* ids, const int32_t* positions, int32_t count, const void* grads,
              int64_t channels, int64_t stride_row, int64_t stride_channel, int64_t padding_idx) {
  return (packed ? sq_norm<16 / sizeof(T), true, T> : sq_norm<1, false, T>)(
      ids, positions, count, static_cast<const T*>(grads), channels, stride_row, stride_channel, padding_idx);
}

}  // namespace

extern "C" void sort(const void* ids, bool wide, int32_t count, int64_t stride, int64_t* sorted, int32_t* positions) {
  int32_t size = 2;
  while (size < count) size *= 2;
  std::vector<int64_t> all(size);
  std::vector<int32_t> from(size);
  const Entries entries = {all.data(), from.data()};
  for (int t = 0; t < size; ++t)
    wide ? load_entry(entries, t, count, static_cast<const int64_t*>(ids), stride)
         : load_entry(entries, t, count, static_cast<const int32_t*>(ids), stride);
  for (int span = 2; span <= size; span *= 2)
    for (int step = span / 2; step > 0; step /= 2)
      for (int i = size / 2 - 1; i >= 0; --i) exchange(entries, i, span, step);
  for (int t = 0; t < count; ++t) sorted[t] = all[t], positions[t] = from[t];
}

extern "C" double norm(int dtype, bool packed, const int64_t* ids, const int32_t* positions, int32_t count,
                       const void* grads, int64_t channels, int64_t stride_row, int64_t stride_channel,
                       int64_t padding_idx) {
  const auto run = dtype == 0 ? either<float> : dtype == 1 ? either<BFloat16> : dtype == 2 ? either<Float16> : either<double>;
  return run(packed, ids, positions, count, grads, channels, stride_row, stride_channel, padding_idx);
}

extern "C" float widened(bool bfloat16, uint16_t bits) {
  return bfloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
}
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def build_harness(folder: Path, *fault: str) -> ctypes.CDLL:
    """The host library, with one piece of the header replaced if asked."""
    header = (SOURCES / "embedding_norms.h").read_text()
    if fault:
        assert header.count(fault[0]) == 1, f"{fault[0]!r} occurs {header.count(fault[0])} times"
        header = header.replace(*fault)
    (folder / "embedding_norms.h").write_text(header)
    (folder / "harness.cpp").write_text(HARNESS)
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", folder / "harness.cpp"]
    done = subprocess.run([*command, "-o", folder / "harness.so"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(folder / "harness.so"))
    library.norm.restype = ctypes.c_double
    library.widened.restype = ctypes.c_float
    return library


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return build_harness(tmp_path_factory.mktemp("harness"))


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def host_sort(library, ids):
    """(sorted ids, positions) of one sample."""
    count = len(ids)
    ordered, positions = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int32)
    wide = ids.dtype == torch.int64
    library.sort(pointer(ids), wide, count, ctypes.c_int64(ids.stride(0)), pointer(ordered), pointer(positions))
    return ordered, positions


def host_norms(library, ids, grads, padding_idx, packed):
    out = []
    for sample, rows in zip(ids, grads, strict=True):
        ordered, positions = host_sort(library, sample)
        shape = rows.shape[1], rows.stride(0), rows.stride(1), padding_idx
        data = pointer(ordered), pointer(positions), len(sample), pointer(rows)
        out.append(library.norm(DTYPES.index(grads.dtype), packed, *data, *(ctypes.c_int64(x) for x in shape)))
    return torch.tensor(out, dtype=torch.float64)


def check_norms(library, generator, dtype, count, vocabulary, packed):
    channels = 32 if packed else 7
    ids = torch.randint(vocabulary, (3, count), generator=generator)
    grads = torch.randn(3, count, channels, generator=generator, dtype=torch.float64).to(dtype)
    if not packed:
        grads = grads.mT.contiguous().mT
    for padding_idx in (-1, vocabulary // 2):
        got = host_norms(library, ids, grads, padding_idx, packed)
        oracle = reference.embedding_grad_sq_norms(ids, grads.double(), padding_idx)
        if dtype == torch.float64:
            torch.testing.assert_close(got, oracle, rtol=1e-13, atol=1e-13)
        else:
            peer = reference.embedding_grad_sq_norms(ids, grads.float(), padding_idx)
            assert_within_budget(got.float(), oracle, peer, "norms")


@needs_compiler
@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 700, 4096])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sorting_network(harness, generator, count, dtype):
    info = torch.iinfo(dtype)
    for low, high in ((0, 4), (info.min, info.max)):
        ids = torch.randint(low, high, (2 * count,), generator=generator, dtype=dtype)[::2]
        ids[count // 2] = info.max  # which also fills the network up
        ordered, positions = host_sort(harness, ids)
        right, order = ids.sort(stable=True)
        assert torch.equal(ordered, right.long())
        assert torch.equal(positions, order.int())


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("count", "vocabulary"),
    [(1, 3), (5, 2), (16, 1), (100, 4), (333, 1000), (700, 11)],  # fewer positions than warps; one segment; few; many
)
def test_segment_sums(harness, generator, dtype, packed, count, vocabulary):
    check_norms(harness, generator, dtype, count, vocabulary, packed)


@needs_compiler
def test_every_16_bit_number_is_widened_exactly(harness):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    for bfloat16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        right = bits.view(dtype).float()
        got = torch.tensor([harness.widened(bfloat16, i) for i in range(2**16)])
        assert torch.equal(got.isnan(), right.isnan())
        assert torch.equal(got.nan_to_num(nan=7.5), right.nan_to_num(nan=7.5))


FAULTS = {
    "a segment that is cut at the end of a share": (
        "segment_start(sample.ids, to, sample.count)", "(to < sample.count ? to : sample.count)",
    ),
    "a segment that is begun again in the middle": ("const int32_t first = segment_start(sample.ids, from, sample.count);",
                                                    "const int32_t first = from;"),
    "padding that counts": ("last && id != sample.padding_idx", "last"),
    "a sum that is not reset": ("if (last) segment[v] = 0;", ""),
    "ties in the wrong order": ("(b == a && q < p)", "(b == a && q > p)"),
    "every other exchange left out": ("if (swapped != ascending) return;", "if (swapped != ascending || i % 2) return;"),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(generator, tmp_path, fault):
    library = build_harness(tmp_path, *FAULTS[fault])
    if "ties" in fault:  # of which the norms know nothing but their last bits
        ids = torch.randint(4, (100,), generator=generator)
        assert not torch.equal(host_sort(library, ids)[1], ids.sort(stable=True).indices.int())
        return
    with pytest.raises(AssertionError):
        check_norms(library, generator, torch.float32, 333, 40, True)


# --- how it is built and reached --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builds() -> dict[str, str]:
    """What setup.py says with each value of ADASELECT_CUDA; one process, which loads torch once."""
    program = """
import contextlib, io, json, os, runpy, sys
sys.argv = ["setup.py", "--quiet", "--name"]
said = {}
for value in ("0", "yes", "1"):
    os.environ["ADASELECT_CUDA"] = value
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path("setup.py", run_name="__main__")
        except Exception as error:
            print(type(error).__name__, error)
    said[value] = out.getvalue()
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_flag_of_the_build_is_obeyed_or_refused(builds):
    assert builds["0"].split()[-1] == "adaselect_kernels"
    assert "RuntimeError ADASELECT_CUDA must be 0, 1 or unset, got 'yes'" in builds["yes"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can build the CUDA kernels")
def test_a_build_that_needs_cuda_says_what_is_missing(builds):
    assert "RuntimeError ADASELECT_CUDA=1 needs a CUDA build of torch" in builds["1"]


def test_the_cuda_implementation_serves_what_it_has_and_says_why_not():
    cpu = torch.device("cpu")
    for operator in (None, "linear_grad_sq_norms", "select_topk"):
        with pytest.raises(RuntimeError, match="no operator of this function has a CUDA C"):
            dispatch.resolve("cuda", cpu, operator)
    for operator in dispatch.CUDA_OPERATORS:
        reason = "it serves cuda tensors, got cpu" if dispatch.CUDA_EXTENSION else "ADASELECT_CUDA=1 builds it"
        with pytest.raises(RuntimeError, match=reason):
            dispatch.resolve("cuda", cpu, operator)
