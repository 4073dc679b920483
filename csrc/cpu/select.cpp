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
constexpr int64_t kGrainChunks = 2;   // worth a thread of their own
constexpr int64_t kSmall = 4096;      // up to here the keys are made once
constexpr int64_t kFew = kBlockKeys;  // up to here bisection finds the k-th
constexpr int64_t kFewestSampled = 256, kMostSampled = 4096, kKeysPerSample = 64;
constexpr int kDigitBits = 11;
constexpr int64_t kRadixSorted = 1024;  // above, a radix sort beats comparisons

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
  void gather(const int64_t* rows, int64_t count, Key* keys) const {
    if (compacted == nullptr) return kernel.gather(scores, stride, rows, count, largest, keys);
    for (int64_t i = 0; i < count; ++i) keys[i] = compacted[rows[i]];
  }
  Key at(int64_t row) const {
    Key key;
    gather(&row, 1, &key);
    return key;
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

// Keys from `low` to `high`, both included.
template <class Key>
struct Bracket {
  Key low = 0, high = ~Key{0};
};

struct Count {
  int64_t above = 0, equal = 0;  // keys above a threshold, and equal to it
};

// The keys of a source counted against a bracket, and those strictly inside it. Ties may pile up at the ends: there
// they are only counted.
template <class Key>
struct Split {
  struct Chunk : SplitCounts {
    int64_t first = 0;  // of its keys inside
  };
  Bracket<Key> bracket;
  Scratch memory;
  KeySource<Key> inside;  // a chunk's together, the chunks in any order
  std::vector<Chunk> chunks;
  SplitCounts total;

  Split(const KeySource<Key>& source, Bracket<Key> bracket)
      : bracket(bracket),
        memory(source.n * static_cast<int64_t>(sizeof(Key))),  // pages without keys are never touched
        inside(source),
        chunks(source.chunks()) {
    Key* kept = memory.template take<Key>(0);
    inside.compacted = kept;
    std::atomic<int64_t> filled{0};
    at::parallel_for(0, source.chunks(), kGrainChunks, [&](int64_t begin, int64_t end) {
      alignas(64) Key found[kChunkKeys + kCompactSlack];
      for (int64_t i = begin; i < end; ++i) {
        Chunk& chunk = chunks[i];
        source.for_each_block(i, [&](const Key* keys, int64_t count, int64_t) {
          source.kernel.split(keys, count, bracket.low, bracket.high, found, chunk);
        });
        chunk.first = filled.fetch_add(chunk.inside);
        std::memcpy(kept + chunk.first, found, chunk.inside * sizeof(Key));
      }
    });
    for (const Chunk& chunk : chunks) {
      total.above += chunk.above;
      total.at_high += chunk.at_high;
      total.at_low += chunk.at_low;
    }
    total.inside = inside.n = filled.load();
  }

  bool holds(int64_t k) const {
    const int64_t at_low = bracket.low < bracket.high ? total.at_low : 0;  // else the same keys as at_high
    return total.above < k && k <= total.above + total.at_high + total.inside + at_low;
  }
  // Of each chunk, for a threshold in the bracket.
  std::vector<Count> counts(Key threshold) const {
    std::vector<Count> found;
    for (const Chunk& chunk : chunks) {
      const Key* keys = inside.compacted + chunk.first;
      const bool at_high = threshold == bracket.high, at_low = threshold == bracket.low;
      Count count{chunk.above, at_high ? chunk.at_high : chunk.at_low};
      if (!at_high) count.above += chunk.at_high + inside.kernel.count_at_least(keys, chunk.inside, threshold + 1);
      if (!at_high && !at_low) count.equal = inside.kernel.count_equal(keys, chunk.inside, threshold);
      found.push_back(count);
    }
    return found;
  }
};

template <class Key>
Key kth_largest(const KeySource<Key>& source, Bracket<Key> range, int64_t k);

// A bracket that holds the k-th largest key unless a sample misleads: the ranks of the sample four standard deviations
// to either side.
template <class Key>
Bracket<Key> sampled_bracket(const KeySource<Key>& source, Bracket<Key> range, int64_t k) {
  const int64_t n = source.n, count = std::clamp(n / kKeysPerSample, kFewestSampled, kMostSampled), step = n / count;
  int64_t rows[kMostSampled];
  Key keys[kMostSampled];
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t jitter = static_cast<uint32_t>(i) * 0x9E3779B9u;  // scores may have a period
    rows[i] = i * n / count + (step * int64_t{jitter} >> 32);
  }
  source.gather(rows, count, keys);
  KeySource<Key> sample = source;
  sample.n = count;
  sample.compacted = keys;
  const double share = static_cast<double>(k) / static_cast<double>(n), rank = share * static_cast<double>(count);
  const double margin = 4 * std::sqrt(rank * (1 - share)) + 2;
  const auto first = static_cast<int64_t>(rank - margin), last = static_cast<int64_t>(rank + margin) + 1;
  if (first >= 1) range.high = kth_largest<Key>(sample, range, first);
  if (last <= count) range.low = kth_largest<Key>(sample, range, last);
  return range;
}

// A bracket that holds the k-th largest of keys in `range`: those that agree with it in the next digit.
template <class Key>
Bracket<Key> digit_bracket(const KeySource<Key>& source, Bracket<Key> range, int64_t k) {
  constexpr int64_t digits = int64_t{1} << kDigitBits;
  int shift = 0;
  while ((range.high - range.low) >> shift >= Key{digits}) ++shift;
  std::array<int64_t, digits> total{};
  std::mutex mutex;
  at::parallel_for(0, source.chunks(), kGrainChunks, [&](int64_t begin, int64_t end) {
    // Neighbouring keys often share a digit: four tables keep their increments independent.
    std::array<std::array<uint32_t, digits>, 4> tables{};
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      source.for_each_block(chunk, [&](const Key* keys, int64_t count, int64_t) {
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
          for (int j = 0; j < 4; ++j) ++tables[j][(keys[i + j] - range.low) >> shift];
        }
        for (; i < count; ++i) ++tables[0][(keys[i] - range.low) >> shift];
      });
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (int64_t d = 0; d < digits; ++d) total[d] += int64_t{tables[0][d]} + tables[1][d] + tables[2][d] + tables[3][d];
  });
  int64_t digit = digits - 1;
  while (total[digit] < k) k -= total[digit--];
  const Key low = range.low + (Key(digit) << shift);
  return {low, std::min(range.high, low + ((Key{1} << shift) - 1))};
}

// A split whose bracket holds the k-th largest of keys in `range`, and less than half of the keys or one digit.
template <class Key>
Split<Key> split_around(const KeySource<Key>& source, Bracket<Key> range, int64_t k) {
  const Bracket<Key> bracket = sampled_bracket<Key>(source, range, k);
  Split<Key> sampled(source, bracket);
  if (sampled.holds(k) && sampled.total.inside <= source.n / 2) return sampled;
  return Split<Key>(source, digit_bracket<Key>(source, range, k));
}

template <class Key>
Key kth_of_split(const Split<Key>& split, int64_t k) {
  const auto [low, high] = split.bracket;
  k -= split.total.above + split.total.at_high;
  if (k <= 0) return high;
  if (k > split.total.inside) return low;
  return kth_largest<Key>(split.inside, {low + 1, high - 1}, k);
}

// The k-th largest of keys in `range`.
template <class Key>
Key kth_largest(const KeySource<Key>& source, Bracket<Key> range, int64_t k) {
  if (source.n > kFew) return kth_of_split<Key>(split_around<Key>(source, range, k), k);
  alignas(64) Key buffer[kFew];
  const Key* keys = source.get(0, source.n, buffer);
  while (range.low < range.high) {
    const Key middle = range.high - (range.high - range.low) / 2;
    if (source.kernel.count_at_least(keys, source.n, middle) >= k) {
      range.low = middle;
    } else {
      range.high = middle - 1;
    }
  }
  return range.low;
}

// Rows of the keys above `threshold` and of the first keys equal to it, k in all, ascending; `counts` of each chunk.
template <class Key>
void emit(const KeySource<Key>& source, Key threshold, std::vector<Count> counts, int64_t k, int64_t* indices) {
  int64_t ties = k;  // the lowest rows of those equal to the threshold
  for (const Count& count : counts) ties -= count.above;
  std::vector<int64_t> ends(counts.size());  // of each chunk's rows
  int64_t end = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    counts[i].equal = std::min(ties, counts[i].equal);
    ties -= counts[i].equal;
    ends[i] = end += counts[i].above + counts[i].equal;
  }
  at::parallel_for(0, source.chunks(), kGrainChunks, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      int64_t ties_left = counts[chunk].equal, room = counts[chunk].above + ties_left;
      if (room == 0) continue;
      source.for_each_block(chunk, [&](const Key* keys, int64_t count, int64_t first) {
        int64_t* out = indices + ends[chunk] - room;
        const int64_t equal = ties_left > 0 ? source.kernel.count_equal(keys, count, threshold) : 0;
        if (equal <= ties_left) {  // all equal keys or none of them
          room -= source.kernel.compact_rows(keys, count, ties_left > 0 ? threshold : threshold + 1, first, out, room);
          ties_left -= equal;
          return;
        }
        for (int64_t i = 0; i < count; ++i) {
          if (keys[i] < threshold || (keys[i] == threshold && ties_left-- <= 0)) continue;
          *out++ = first + i;
          --room;
        }
        ties_left = 0;
      });
    }
  });
}

// Rows of the k largest keys, the lowest of equal ones, ascending.
template <class Key>
void choose(KeySource<Key> source, int64_t k, int64_t* indices) {
  alignas(64) Key buffer[kSmall];
  if (source.n <= kSmall) source.compacted = source.get(0, source.n, buffer);
  if (source.n > kFew) {
    const Split<Key> split = split_around<Key>(source, {}, k);
    const Key threshold = kth_of_split<Key>(split, k);
    emit<Key>(source, threshold, split.counts(threshold), k, indices);
  } else {
    const Key threshold = kth_largest<Key>(source, {}, k);
    const int64_t equal = source.kernel.count_equal(source.compacted, source.n, threshold);
    const int64_t above = source.kernel.count_at_least(source.compacted, source.n, threshold) - equal;
    emit<Key>(source, threshold, {{above, equal}}, k, indices);
  }
}

// Rows given in ascending order, best first; equal keys keep their order.
template <class Key>
void sort_by_score(const KeySource<Key>& source, int64_t k, int64_t* indices) {
  std::vector<Key> keys(k);
  source.gather(indices, k, keys.data());
  std::vector<std::pair<Key, int64_t>> ranked(k);
  for (int64_t i = 0; i < k; ++i) ranked[i] = {~keys[i], indices[i]};
  if (k <= kRadixSorted) {
    std::sort(ranked.begin(), ranked.end());
  } else {
    std::vector<std::pair<Key, int64_t>> sorted(k);
    for (int shift = 0; shift < static_cast<int>(sizeof(Key)) * 8; shift += 8) {
      std::array<int64_t, 257> first{};  // place of each digit
      for (const auto& one : ranked) ++first[(one.first >> shift & 255) + 1];
      for (int digit = 0; digit < 256; ++digit) first[digit + 1] += first[digit];
      for (const auto& one : ranked) sorted[first[one.first >> shift & 255]++] = one;
      ranked.swap(sorted);
    }
  }
  for (int64_t i = 0; i < k; ++i) indices[i] = ranked[i].second;
}

template <class Key>
void select_keys(const KeySource<Key>& source, int64_t k, bool by_score, int64_t* indices) {
  choose<Key>(source, k, indices);
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
  choose<Key>(source, k, indices);
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
