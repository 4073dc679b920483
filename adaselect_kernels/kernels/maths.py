"""Scalar and block maths every kernel shares: exponentials, noise, ordered keys, 64-bit options."""

import struct

import triton
import triton.language as tl
from triton.language.target_info import is_hip

LOG2E = tl.constexpr(1.4426950408889634)


def float_bits(value: float) -> int:
    """The float64 pattern of `value` as a signed integer: Triton passes Python floats as float32, integers exactly."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def float64_from_bits(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def exponential(x):
    """e^x in the dtype of x; exactly 1 at 0."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # e^x = 2^(x log2 e), one multiply and the hardware's exp2
        return tl.exp2(x * LOG2E)


@triton.jit
def exponential_precise(x):
    """e^x for x <= 0 to a rounding or two of its own dtype; for work done once a row or a sample."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -200.0, -200.0, x)  # e^-200 is 0 in float32, and -inf would be inf - inf below
        # e^x = 2^n e^r, r = x - n ln 2 with ln 2 in two parts, the first of few bits so that n times it is exact
        n = tl.floor(x * LOG2E + 0.5)
        r = (x - n * 0.693359375) + n * 2.12194440e-4
        return tl.exp2(n) * tl.exp2(r * LOG2E)


@triton.jit
def tanh(x):
    """tanh x to a few roundings of its own dtype, relative to the result also near 0."""
    square = x * x
    # x less what Lambert's continued fraction to its seventh term says: below 1/2 it is off by 2^-52 of the result at most
    rest = ((27.0 * square + 2772.0) * square + 45045.0) * square
    rest = rest / (((28.0 * square + 3150.0) * square + 62370.0) * square + 135135.0)
    small = x - x * rest
    t = exponential(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * t / (1.0 + t)
    if x.dtype == tl.float64:
        near = tl.abs(x) < 0.5
    else:
        near = tl.abs(x) < 1.0  # there the fraction is off by 2^-38, and the other form by up to two roundings
    return tl.where(near, small, tl.where(x < 0, -large, large))


@triton.jit
def is_finite(x):
    return x - x == 0


@triton.jit
def strided_offset(rows, inner, stride_outer, stride_inner):
    """Element offset, 64-bit, of position `rows` of an [outer, inner] array; inner = 1 for a vector."""
    rows = rows.to(tl.int64)
    return (rows // inner) * stride_outer + (rows % inner) * stride_inner


@triton.jit
def exponential_noise(rows, step, seed, DTYPE: tl.constexpr):
    """E = -log u, u = (floor(b / 512) + 0.5) 2^-23 with b the first word of Philox 4x32-10."""
    counter = rows.to(tl.uint32)
    low = tl.zeros_like(counter) + (step & 0xFFFFFFFF).to(tl.uint32)
    high = tl.zeros_like(counter) + (step >> 32).to(tl.uint32)
    b, _, _, _ = tl.philox(seed.to(tl.int64), counter, low, high, tl.zeros_like(counter), 10)
    # u = (floor(b / 512) + 0.5) 2^-23, exact in float32
    u = ((b >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(u.to(DTYPE))


@triton.jit
def ordered_key(x, LARGEST: tl.constexpr):
    """Unsigned integers that order as the scores do, better ones larger; NaN is 0, below every number; -0.0 as 0.0."""
    if x.dtype == tl.float64:
        bits = tl.where(x == 0, 0.0, x).to(tl.uint64, bitcast=True)
        flip = tl.where((bits >> 63) != 0, 0xFFFFFFFFFFFFFFFF, 0x8000000000000000).to(tl.uint64)
        worst = tl.full(bits.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64)
    else:
        x = x.to(tl.float32)  # exact, and it keeps the order
        bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
        flip = tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
        worst = tl.full(bits.shape, 0xFFFFFFFF, tl.uint32)
    key = bits ^ flip
    if not LARGEST:
        key = key ^ worst
    return tl.where(x == x, key, tl.zeros_like(key))


@triton.jit
def settle():
    """Every thread's stores and additions precede what any thread of the program does next with `release`."""
    if is_hip():
        # AMD's barrier does not wait for memory, and the release of one wave only for its own
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [tl.arange(0, 64)], tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def last_to_arrive(counter_ptr, arrivals):
    """True in the program that arrives last: it sees what all the others stored, and leaves the counter at 0.

    Read the others' data with `.cg`.
    """
    settle()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


TICKETS = tl.constexpr(16)  # int32 at the start of a launch's counters: its tickets, then the arrivals of each step


@triton.jit
def begin_step(counters_ptr, programs):
    """(step, program) of this program in a launch of several steps of `programs` programs each; the steps before are done.

    Numbers are given out in the order in which programs start, not by program_id: whoever is waited for has started, and
    the program with the lowest number at work waits for nobody. So a launch ends however few programs run at a time.
    """
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    step = ticket // programs
    if step > 0:
        # acquire, then the barrier that hands the answer to every thread: what the step before stored is seen by `.cg`
        while tl.atomic_add(counters_ptr + step, 0, sem="acquire") < programs:
            pass
    return step, ticket % programs


@triton.jit
def end_step(counters_ptr, step, programs, STEPS: tl.constexpr, COUNTERS: tl.constexpr):
    """This program's stores precede its arrival; the last of the last step sets all counters back to 0.

    Nobody looks at a counter then: all programs of the last step have arrived, so all earlier ones have ended.
    """
    ZEROS: tl.constexpr = 1024
    if step < STEPS - 1:
        settle()
        tl.atomic_add(counters_ptr + 1 + step, 1, sem="release")
    else:
        if last_to_arrive(counters_ptr + 1 + step, programs):
            for start in range(0, COUNTERS, ZEROS):
                at = start + tl.arange(0, ZEROS)
                tl.store(counters_ptr + at, tl.zeros([ZEROS], tl.int32), mask=at < COUNTERS)
