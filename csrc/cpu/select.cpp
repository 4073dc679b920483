#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>

#include "operators.h"

namespace adaselect {
namespace {

constexpr int64_t kBlockKeys = 1024;  // keys are made and used a block at a time, in the first-level cache
constexpr int64_t kChunkKeys = 16 * kBlockKeys;
constexpr int64_t kGrainChunks = 2;  // worth a thread of their own
constexpr int64_t kSmall = 4096;     // up to here one block and bisection do
constexpr int kDigitBits = 11;
constexpr int64_t kDigits = int64_t{1} << kDigitBits;

// Where keys come from: scores of any dtype and stride, or keys compacted before.
template <class Key>
struct KeySource {
  const SelectKernels<Key>& kernel;
  const void* scores;
  int64_t element_size, stride, n;
  bool largest;
  const Key* compacted;

  // Keys [begin, begin + count): in `buffer`, or where they already are.
  const Key* get(int64_t begin, int64_t count, Key* buffer) const {
    if (compacted != nullptr) return compacted + begin;
    kernel.fill(static_cast<const char*>(scores) + begin * stride * element_size, stride, count, largest, buffer);
    return buffer;
  }
  Key at(int64_t row) const {
    Key key;
    return *get(row, 1, &key);
  }
  int64_t chunks() const { return (n + kChunkKeys - 1) / kChunkKeys; }
  // f(keys, count, first key) for the blocks of a chunk.
  template <class F>
  void for_each_block(int64_t chunk, F f) const {
    alignas(64) Key buffer[kBlockKeys];
    const int64_t end = std::min(n, (chunk + 1) * kChunkKeys);
    for (int64_t first = chunk * kChunkKeys; first < end; first += kBlockKeys) {
      const int64_t count = std::min(kBlockKeys, end - first);
      f(get(first, count, buffer), count, first);
    }
  }
};

using Histogram = std::array<int64_t, kDigits>;

template <class Key>
Histogram digit_histogram(const KeySource<Key>& source, int shift, Key mask) {
  Histogram total{};
  std::mutex mutex;
  at::parallel_for(0, source.chunks(), kGrainChunks, [&](int64_t begin, int64_t end) {
    // Neighbouring keys often share a digit: four tables keep their increments independent.
    std::array<std::array<uint32_t, kDigits>, 4> tables{};
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      source.for_each_block(chunk, [&](const Key* keys, int64_t count, int64_t) {
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
          for (int j = 0; j < 4; ++j) ++tables[j][keys[i + j] >> shift & mask];
        }
        for (; i < count; ++i) ++tables[0][keys[i] >> shift & mask];
      });
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (int64_t d = 0; d < kDigits; ++d)
      total[d] += int64_t{tables[0][d]} + tables[1][d] + tables[2][d] + tables[3][d];
  });
  return total;
}

// Copies the keys with key >> shift == prefix to `out`, in no particular order.
template <class Key>
void gather_candidates(const KeySource<Key>& source, int shift, Key prefix, Key* out) {
  std::atomic<int64_t> filled{0};
  at::parallel_for(0, source.chunks(), kGrainChunks, [&](int64_t begin, int64_t end) {
    alignas(64) Key matches[kBlockKeys + kCompactSlack];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      source.for_each_block(chunk, [&](const Key* keys, int64_t count, int64_t) {
        const int64_t found = source.kernel.compact_prefix(keys, count, shift, prefix, matches);
        std::memcpy(out + filled.fetch_add(found), matches, found * sizeof(Key));
      });
    }
  });
}

// The k-th largest key: radix select from the highest digit, then bisection once few candidates are left.
template <class Key>
Key kth_largest(KeySource<Key> source, int64_t k) {
  std::optional<Scratch> candidates;
  Key threshold = 0;  // its bits from `shift` up are known
  int shift = sizeof(Key) * 8;
  while (source.n > kSmall && shift > 0) {
    const int digit_bits = std::min(shift, kDigitBits);
    shift -= digit_bits;
    const Histogram histogram = digit_histogram<Key>(source, shift, (Key{1} << digit_bits) - 1);
    int64_t digit = kDigits - 1;
    while (histogram[digit] < k) k -= histogram[digit--];
    threshold |= Key(digit) << shift;
    const int64_t left = histogram[digit];
    if (left == source.n || shift == 0) continue;  // all share the digit
    Scratch kept(left * static_cast<int64_t>(sizeof(Key)));
    Key* out = kept.template take<Key>(0);
    gather_candidates<Key>(source, shift, threshold >> shift, out);
    candidates = std::move(kept);
    source.compacted = out;
    source.n = left;
  }
  if (shift == 0) return threshold;
  alignas(64) Key buffer[kSmall];
  const Key* keys = source.get(0, source.n, buffer);
  while (--shift >= 0) {
    const Key higher = threshold | Key{1} << shift;
    if (source.kernel.count_at_least(keys, source.n, higher) >= k) threshold = higher;
  }
  return threshold;
}

// Rows of the keys above `threshold` and of the first keys equal to it, k in all, ascending.
template <class Key>
void emit(const KeySource<Key>& source, Key threshold, int64_t k, int64_t* indices) {
  struct Count {
    int64_t above = 0, equal = 0;
  };
  std::vector<Count> counts(source.chunks());
  at::parallel_for(0, source.chunks(), kGrainChunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      source.for_each_block(chunk, [&](const Key* keys, int64_t count, int64_t) {
        const int64_t equal = source.kernel.count_equal(keys, count, threshold);
        counts[chunk].equal += equal;
        counts[chunk].above += source.kernel.count_at_least(keys, count, threshold) - equal;
      });
    }
  });
  Count total;  // and each chunk's count becomes what lies before it
  for (Count& count : counts) {
    const Count here = count;
    count = total;
    total.above += here.above;
    total.equal += here.equal;
  }
  const int64_t ties = k - total.above;  // the lowest rows of those equal to the threshold
  at::parallel_for(0, source.chunks(), kGrainChunks, [&](int64_t begin, int64_t end) {
    alignas(64) int64_t rows[kBlockKeys + kCompactSlack];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t ties_left = ties - std::min(ties, counts[chunk].equal);
      int64_t* out = indices + counts[chunk].above + (ties - ties_left);
      source.for_each_block(chunk, [&](const Key* keys, int64_t count, int64_t first) {
        const int64_t equal = ties_left > 0 ? source.kernel.count_equal(keys, count, threshold) : 0;
        int64_t found = 0;
        if (equal <= ties_left) {  // all equal keys or none of them
          found = source.kernel.compact_rows(keys, count, ties_left > 0 ? threshold : threshold + 1, first, rows);
          ties_left -= equal;
        } else {
          for (int64_t i = 0; i < count; ++i) {
            if (keys[i] > threshold || (keys[i] == threshold && ties_left-- > 0)) rows[found++] = first + i;
          }
          ties_left = 0;
        }
        std::memcpy(out, rows, found * sizeof(int64_t));
        out += found;
      });
    }
  });
}

template <class Key>
void sort_by_score(const KeySource<Key>& source, int64_t k, int64_t* indices) {
  std::vector<std::pair<Key, int64_t>> ranked(k);
  for (int64_t i = 0; i < k; ++i) ranked[i] = {~source.at(indices[i]), indices[i]};
  std::sort(ranked.begin(), ranked.end());
  for (int64_t i = 0; i < k; ++i) indices[i] = ranked[i].second;
}

template <class Key>
void select_keys(KeySource<Key> source, int64_t k, bool by_score, int64_t* indices) {
  alignas(64) Key buffer[kSmall];
  if (source.n <= kSmall) source.compacted = source.get(0, source.n, buffer);
  emit<Key>(source, kth_largest<Key>(source, k), k, indices);
  if (by_score) sort_by_score<Key>(source, k, indices);
}

// How many keys are at least `least`.
template <class Key>
int64_t count_keys(const KeySource<Key>& source, Key least) {
  std::atomic<int64_t> total{0};
  at::parallel_for(0, source.chunks(), kGrainChunks, [&](int64_t begin, int64_t end) {
    int64_t found = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      source.for_each_block(chunk, [&](const Key* keys, int64_t count, int64_t) {
        found += source.kernel.count_at_least(keys, count, least);
      });
    }
    total += found;
  });
  return total.load();
}

// One row of a mask, false before: true for the clamp(floor(gamma n + 0.5), 1, n) best of its n finite scores.
template <class Key>
void mark_best(KeySource<Key> source, double gamma, bool* mask) {
  constexpr int mantissa = sizeof(Key) == 4 ? 23 : 52;
  constexpr Key lowest_finite = Key{1} << mantissa, infinity = ~(lowest_finite - 1);
  alignas(64) Key buffer[kSmall];
  if (source.n <= kSmall) source.compacted = source.get(0, source.n, buffer);
  const int64_t infinite = count_keys<Key>(source, infinity);  // the first in the order, left out at the end
  const int64_t finite = count_keys<Key>(source, lowest_finite) - infinite;
  if (finite == 0) return;
  const double wanted = std::floor(gamma * static_cast<double>(finite) + 0.5);
  const int64_t k = infinite + std::min(finite, std::max<int64_t>(1, static_cast<int64_t>(wanted)));
  Scratch scratch(k * static_cast<int64_t>(sizeof(int64_t)));
  int64_t* indices = scratch.take<int64_t>(0);
  emit<Key>(source, kth_largest<Key>(source, k), k, indices);
  for (int64_t i = 0; i < k; ++i) mask[indices[i]] = infinite == 0 || source.at(indices[i]) < infinity;
}

}  // namespace

void select(const void* scores, Dtype dtype, int64_t stride, int64_t n, int64_t k, bool largest, bool by_score,
            int64_t* indices) {
  if (dtype == Dtype::kFloat64) {
    select_keys<uint64_t>({*kernels().select64, scores, 8, stride, n, largest, nullptr}, k, by_score, indices);
  } else {
    const auto& kernel = kernels().select32[static_cast<int>(dtype)];
    const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
    select_keys<uint32_t>({kernel, scores, size, stride, n, largest, nullptr}, k, by_score, indices);
  }
}

at::Tensor select_topk(const at::Tensor& scores, int64_t k, bool largest, std::string_view order) {
  check_float_vector(scores, "scores");
  check_k(k, scores.size(0));
  const bool by_score = parse_choice(order, "order", "score", "index");
  at::Tensor indices = at::detail::empty_cpu({k}, at::kLong);
  select(scores.const_data_ptr(), dtype_of(scores, "scores"), scores.stride(0), scores.size(0), k, largest, by_score,
         indices.mutable_data_ptr<int64_t>());
  return indices;
}

at::Tensor select_mask(const at::Tensor& scores, double gamma) {
  check_cpu(scores, "scores");
  const Dtype dtype = dtype_of(scores, "scores");
  TORCH_CHECK_VALUE(scores.dim() == 2, "scores must be [S, T], got shape ", scores.sizes());
  TORCH_CHECK_VALUE(gamma > 0 && gamma <= 1, "gamma must be in (0, 1], got ", gamma);
  const int64_t sequences = scores.size(0), n = scores.size(1), size = scores.element_size();
  at::Tensor mask = at::detail::empty_cpu({sequences, n}, at::kBool);
  std::memset(mask.mutable_data_ptr(), 0, mask.numel());
  if (n == 0) return mask;
  const char* first = static_cast<const char*>(scores.const_data_ptr());
  const auto mark = [&](int64_t s) {
    const void* row = first + s * scores.stride(0) * size;
    bool* out = mask.mutable_data_ptr<bool>() + s * n;
    if (dtype == Dtype::kFloat64) {
      mark_best<uint64_t>({*kernels().select64, row, size, scores.stride(1), n, true, nullptr}, gamma, out);
    } else {
      const auto& kernel = kernels().select32[static_cast<int>(dtype)];
      mark_best<uint32_t>({kernel, row, size, scores.stride(1), n, true, nullptr}, gamma, out);
    }
  };
  if (sequences == 1) {
    mark(0);  // its own passes have threads
  } else {
    at::parallel_for(0, sequences, std::max<int64_t>(1, kChunkKeys / n), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) mark(s);
    });
  }
  return mask;
}

}  // namespace adaselect
