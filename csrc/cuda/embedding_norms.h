// Squared norms of an embedding's per-sample gradients: sum over the ids v of a sample of |sum of the g_t with id v|^2.
//
// The ids of a sample are sorted, with the positions they came from; equal ids are then a segment of rows of `grads`.
// What a thread does is a function of this file, for host and device: the tests run it without a GPU. No torch headers.
#pragma once

#include <cstdint>
#ifdef __CUDACC__
  #define ADASELECT_HD __host__ __device__
#else
  #define ADASELECT_HD
#endif

namespace adaselect::cuda {

// ---- numbers

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

ADASELECT_HD inline float float_from_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
}
ADASELECT_HD inline float widen(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
ADASELECT_HD inline float widen(Float16 x) {
  // move exponent and mantissa into place, then scale by 2^112, the difference of the biases: subnormals come out right
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if ((x.bits & 0x7c00u) == 0x7c00u) return float_from_bits(sign | magnitude | 0x7f800000u);
  return float_from_bits(sign | 0x3f800000u) * (float_from_bits(magnitude) * 5.192296858534828e33f);
}
ADASELECT_HD inline float widen(float x) { return x; }
ADASELECT_HD inline double widen(double x) { return x; }

template <class T>
using Compute = decltype(widen(T{}));

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

// ---- sort

// Ids of one sample in ascending order, equal ones by position, which no two entries share: the order is unique.
struct Entries {
  int64_t* ids;
  int32_t* positions;
};

// One exchange, of kSize / 2, of one step of a bitonic sorting network.
ADASELECT_HD inline void exchange(Entries entries, int i, int span, int step) {
  const int low = 2 * i - (i & (step - 1)), high = low + step;
  const bool ascending = (low & span) == 0;
  const int64_t a = entries.ids[low], b = entries.ids[high];
  const int32_t p = entries.positions[low], q = entries.positions[high];
  const bool swapped = b < a || (b == a && q < p);
  if (swapped != ascending) return;
  entries.ids[low] = b, entries.ids[high] = a;
  entries.positions[low] = q, entries.positions[high] = p;
}

// What entry t of the network is before the sort; the entries from `count` on sort last.
template <class Id>
ADASELECT_HD void load_entry(Entries entries, int t, int count, const Id* ids, int64_t stride) {
  entries.ids[t] = t < count ? static_cast<int64_t>(ids[t * stride]) : INT64_MAX;
  entries.positions[t] = t;
}

// ---- segments

// The first position from `start` on where another id begins, or `count`.
ADASELECT_HD inline int32_t segment_start(const int64_t* ids, int32_t start, int32_t count) {
  if (start <= 0) return 0;
  while (start < count && ids[start] == ids[start - 1]) ++start;
  return start < count ? start : count;
}

template <class T>
struct Sample {
  const int64_t* ids;        // [count] sorted
  const int32_t* positions;  // [count] of the rows
  int32_t count;
  const T* grads;  // first of the thread's channels, of row 0
  int64_t stride_row, stride_channel;
  int64_t padding_idx;
};

constexpr int kUnroll = 8;  // rows a thread has in flight: a warp of them is 4 KB

// sum of squares of `kWidth` channels of the segments that begin in the sorted positions [from, to).
template <int kWidth, bool kPacked, class T>
ADASELECT_HD Compute<T> segments_sq_norm(const Sample<T>& sample, int32_t from, int32_t to) {
  const int32_t first = segment_start(sample.ids, from, sample.count);
  const int32_t end = segment_start(sample.ids, to, sample.count);
  Compute<T> segment[kWidth] = {}, total = 0;
  for (int32_t t = first; t < end; t += kUnroll) {
    Pack<T, kWidth> rows[kUnroll];
#ifdef __CUDA_ARCH__
  #pragma unroll
#endif
    for (int u = 0; u < kUnroll; ++u) {
      if (t + u >= end) break;
      const T* row = sample.grads + sample.positions[t + u] * sample.stride_row;
      if constexpr (kPacked)
        rows[u] = *reinterpret_cast<const Pack<T, kWidth>*>(row);
      else
        for (int v = 0; v < kWidth; ++v) rows[u].at[v] = row[v * sample.stride_channel];
    }
#ifdef __CUDA_ARCH__
  #pragma unroll
#endif
    for (int u = 0; u < kUnroll; ++u) {
      if (t + u >= end) break;
      const int64_t id = sample.ids[t + u];
      const bool last = t + u + 1 == sample.count || sample.ids[t + u + 1] != id;
      const bool counts = last && id != sample.padding_idx;
      for (int v = 0; v < kWidth; ++v) {
        segment[v] += widen(rows[u].at[v]);
        if (counts) total += segment[v] * segment[v];
        if (last) segment[v] = 0;
      }
    }
  }
  return total;
}

// ---- launches, which throw std::runtime_error when they fail

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int kSortLimit = 4096;  // entries of 12 bytes in the 48 KB of shared memory that every device gives a block
constexpr int kWarps = 8;         // share the sorted positions of a sample and a block of channels

// How many partial sums a sample has.
int64_t channel_blocks(int64_t channels, Dtype dtype, bool packed);

// ids [N, T] of any strides, 32 or 64 bits -> sorted ids and the positions they came from, both [N, T]. T <=
// kSortLimit.
void sort_ids(const void* ids, bool wide, int64_t samples, int32_t count, int64_t stride_sample,
              int64_t stride_position, int64_t* sorted, int32_t* positions, void* stream);

// grads [N, T, d] -> out [N]; partials [N, channel_blocks], both float, for float64 double. packed: rows may be read 16
// bytes at a time. Two launches.
void embedding_sq_norms(const int64_t* sorted, const int32_t* positions, const void* grads, Dtype dtype, bool packed,
                        int64_t samples, int32_t count, int64_t channels, int64_t stride_sample, int64_t stride_row,
                        int64_t stride_channel, int64_t padding_idx, void* partials, void* out, void* stream);

}  // namespace adaselect::cuda
