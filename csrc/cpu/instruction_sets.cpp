#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace adaselect {
namespace {

struct InstructionSet {
  KernelTable table;
  bool supported;
};

#define ADASELECT_TABLE(name, isa)                                                                                    \
  KernelTable {                                                                                                       \
    name, isa::row_stats_by_dtype, isa::batch_by_dtype, isa::select32_by_dtype, &isa::select64_kernels,               \
        &isa::matrix32_kernels, &isa::matrix64_kernels, isa::pack_by_dtype, isa::affine_by_dtype,                     \
        isa::segment_by_dtype, isa::bank_by_dtype, isa::loss_by_dtype, &isa::linear32_kernels, &isa::linear64_kernels \
  }

// Best first.
std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  sets.push_back({ADASELECT_TABLE("avx512", avx512), avx512});
  sets.push_back({ADASELECT_TABLE("avx2", avx2), avx2});
#endif
#if defined(__aarch64__)
  const char* baseline_name = "neon";
#else
  const char* baseline_name = "default";
#endif
  sets.push_back({ADASELECT_TABLE(baseline_name, baseline), true});
  return sets;
}
#undef ADASELECT_TABLE

KernelTable choose() {
  const std::vector<InstructionSet> sets = instruction_sets();
  const char* wanted = std::getenv("ADASELECT_CPU_CAPABILITY");
  std::string supported;
  for (const InstructionSet& set : sets) {
    if (!set.supported) continue;
    const bool baseline = &set == &sets.back();
    if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == set.table.name ||
        (baseline && std::string(wanted) == "default")) {
      return set.table;
    }
    supported += std::string(supported.empty() ? "" : ", ") + set.table.name;
  }
  throw std::runtime_error("ADASELECT_CPU_CAPABILITY=" + std::string(wanted) +
                           " is not an instruction set of this machine and build; it has " + supported);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable table = choose();
  return table;
}

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets()) names.emplace_back(set.table.name);
  return names;
}

}  // namespace adaselect
