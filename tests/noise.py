"""Philox 4x32-10 in NumPy, after Salmon et al. 2011, independent of the package: the noise that its draws come from."""

import numpy as np

MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def words(rows, step, seed):
    """First output word b [rows], of key = seed (low, high) and counter = (row, step low, step high, 0)."""
    c0 = np.arange(rows, dtype=np.uint64)
    c1, c2, c3 = (np.full(rows, value, dtype=np.uint64) for value in (step & 0xFFFFFFFF, step >> 32, 0))
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (b >> SHIFT) ^ c1 ^ np.uint64(k0), b & MASK, (a >> SHIFT) ^ c3 ^ np.uint64(k1), a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


def uniform(rows, step, seed):
    """u [rows] float64 = (floor(b / 512) + 0.5) / 2^23."""
    return (words(rows, step, seed) // np.uint64(512) + 0.5) / 2.0**23
