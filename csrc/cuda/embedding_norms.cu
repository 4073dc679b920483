// Launches of embedding_norms.h: which thread takes which part, and how the parts are added up, always in one order.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "embedding_norms.h"

namespace adaselect::cuda {
namespace {

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("launch of ") + kernel + " failed: " + cudaGetErrorString(error));
}

constexpr int kLanes = 32;
constexpr int kThreads = kWarps * kLanes;

template <class T, bool kPacked>
constexpr int kWidth = kPacked ? 16 / sizeof(T) : 1;  // channels a thread

// One sample a block.
template <class Id>
__global__ void __launch_bounds__(1024) sort_kernel(const Id* ids, int32_t count, int32_t size, int64_t stride_sample,
                                                    int64_t stride_position, int64_t* sorted, int32_t* positions) {
  extern __shared__ int64_t shared[];
  const Entries entries = {shared, reinterpret_cast<int32_t*>(shared + size)};
  const int64_t sample = blockIdx.x;
  for (int t = threadIdx.x; t < size; t += blockDim.x)
    load_entry(entries, t, count, ids + sample * stride_sample, stride_position);
  for (int span = 2; span <= size; span *= 2)
    for (int step = span / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) exchange(entries, i, span, step);
    }
  __syncthreads();
  for (int t = threadIdx.x; t < count; t += blockDim.x) {
    sorted[sample * count + t] = entries.ids[t];
    positions[sample * count + t] = entries.positions[t];
  }
}

// The same value in every lane, whatever the order: x + y = y + x at every level of the tree.
template <class C>
__device__ C warp_sum(C value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  return value;
}

template <class C>
__device__ C block_sum(C value) {
  __shared__ C of_warps[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kLanes == 0) of_warps[threadIdx.x / kLanes] = value;
  __syncthreads();
  C total = 0;
  for (int i = 0; i < kWarps; ++i) total += of_warps[i];
  return total;
}

// A block of channels of one sample a block; a warp takes the segments that begin in its share of the positions.
template <class T, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    segments_kernel(const int64_t* sorted, const int32_t* positions, const T* grads, int32_t count, int64_t channels,
                    int32_t blocks, int64_t stride_sample, int64_t stride_row, int64_t stride_channel,
                    int64_t padding_idx, Compute<T>* partials) {
  constexpr int width = kWidth<T, kPacked>;
  const int64_t sample = blockIdx.x / blocks;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x % blocks) * kLanes + threadIdx.x % kLanes) * width;
  const int32_t share = (count + kWarps - 1) / kWarps, from = threadIdx.x / kLanes * share;
  const Sample<T> mine = {sorted + sample * count,
                          positions + sample * count,
                          count,
                          grads + sample * stride_sample + channel * stride_channel,
                          stride_row,
                          stride_channel,
                          padding_idx};
  Compute<T> total = 0;
  if (channel < channels && from < count) total = segments_sq_norm<width, kPacked>(mine, from, from + share);
  total = block_sum(total);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

template <class C>
__global__ void __launch_bounds__(kThreads) combine_kernel(const C* partials, int32_t count, C* out) {
  C total = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) total += partials[blockIdx.x * static_cast<int64_t>(count) + i];
  total = block_sum(total);
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

template <class T, bool kPacked>
void launch(const int64_t* sorted, const int32_t* positions, const void* grads, int64_t samples, int32_t count,
            int64_t channels, int64_t stride_sample, int64_t stride_row, int64_t stride_channel, int64_t padding_idx,
            void* partials, void* out, cudaStream_t stream) {
  constexpr int per_block = kLanes * kWidth<T, kPacked>;
  const int32_t blocks = static_cast<int32_t>((channels + per_block - 1) / per_block);
  auto* sums = static_cast<Compute<T>*>(partials);
  segments_kernel<T, kPacked><<<static_cast<unsigned>(samples * blocks), kThreads, 0, stream>>>(
      sorted, positions, static_cast<const T*>(grads), count, channels, blocks, stride_sample, stride_row,
      stride_channel, padding_idx, sums);
  check_launch("segments_kernel");
  combine_kernel<<<static_cast<unsigned>(samples), kThreads, 0, stream>>>(sums, blocks, static_cast<Compute<T>*>(out));
  check_launch("combine_kernel");
}

}  // namespace

int64_t channel_blocks(int64_t channels, Dtype dtype, bool packed) {
  const int bytes = dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
  const int64_t per_block = kLanes * (packed ? 16 / bytes : 1);
  return (channels + per_block - 1) / per_block;
}

void sort_ids(const void* ids, bool wide, int64_t samples, int32_t count, int64_t stride_sample,
              int64_t stride_position, int64_t* sorted, int32_t* positions, void* stream) {
  int32_t size = 2;
  while (size < count) size *= 2;
  const unsigned blocks = static_cast<unsigned>(samples);
  const int threads = size / 2 < kLanes ? kLanes : size / 2 > 1024 ? 1024 : size / 2;
  const size_t bytes = size * (sizeof(int64_t) + sizeof(int32_t));
  const auto on = static_cast<cudaStream_t>(stream);
  if (wide)
    sort_kernel<<<blocks, threads, bytes, on>>>(static_cast<const int64_t*>(ids), count, size, stride_sample,
                                                stride_position, sorted, positions);
  else
    sort_kernel<<<blocks, threads, bytes, on>>>(static_cast<const int32_t*>(ids), count, size, stride_sample,
                                                stride_position, sorted, positions);
  check_launch("sort_kernel");
}

void embedding_sq_norms(const int64_t* sorted, const int32_t* positions, const void* grads, Dtype dtype, bool packed,
                        int64_t samples, int32_t count, int64_t channels, int64_t stride_sample, int64_t stride_row,
                        int64_t stride_channel, int64_t padding_idx, void* partials, void* out, void* stream) {
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    const auto on = static_cast<cudaStream_t>(stream);
    (packed ? launch<T, true> : launch<T, false>)(sorted, positions, grads, samples, count, channels, stride_sample,
                                                  stride_row, stride_channel, padding_idx, partials, out, on);
  };
  switch (dtype) {
    case Dtype::kFloat32:
      return with(float{});
    case Dtype::kBFloat16:
      return with(BFloat16{});
    case Dtype::kFloat16:
      return with(Float16{});
    case Dtype::kFloat64:
      return with(double{});
  }
}

}  // namespace adaselect::cuda
