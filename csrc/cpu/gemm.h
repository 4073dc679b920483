// Matrix products through the BLAS that torch uses: one tile each, on the thread that asks, so that results do not
// depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <atomic>

namespace adaselect {

// A matrix of the compute type: element (i, j) at data[i * row + j * column], one of the two strides 1.
template <class T>
struct Matrix {
  T* data;
  int64_t row, column = 1;

  Matrix at(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  Matrix transposed() const { return {data, column, row}; }
  at::Tensor view(int64_t rows, int64_t columns) const {
    return at::from_blob(const_cast<std::remove_const_t<T>*>(data), {rows, columns}, {row, column},
                         c10::CppTypeToScalarType<std::remove_const_t<T>>::value);
  }
};

// Products that are added up before their sum joins c: a BLAS that sums 8192 of them at once, as it does for few rows,
// has three times the rounding.
inline constexpr int64_t kProductTerms = 512;

// c [m, n] = (accumulate ? c : 0) + a [m, k] b [k, n].
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, Matrix<const T> a, Matrix<const T> b, bool accumulate, Matrix<T> c) {
  at::Tensor out = c.view(m, n);
  for (int64_t first = 0; first < k; first += kProductTerms) {
    const int64_t terms = std::min(kProductTerms, k - first);
    const at::Tensor left = a.at(0, first).view(m, terms), right = b.at(first, 0).view(terms, n);
    if (accumulate || first > 0) {
      at::cpu::addmm_out(out, out, left, right);
    } else {
      at::cpu::mm_out(out, left, right);
    }
  }
}

// f(task) for every task, whichever thread is free: tasks write apart and take unequal times. make() gives the f of a
// thread, with the memory that it keeps from task to task.
template <class Make>
void for_each_task_of(int64_t tasks, Make make) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto f = make();
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task);
  });
}
template <class F>
void for_each_task(int64_t tasks, F f) {
  for_each_task_of(tasks, [&] { return [&](int64_t task) { f(task); }; });
}

}  // namespace adaselect
