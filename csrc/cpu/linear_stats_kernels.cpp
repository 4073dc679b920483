#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#include <type_traits>
#include <utility>

#include "kernels.h"

#define ADASELECT_KERNEL_FILE "linear_stats.inc"
#include "for_each_isa.inc"
