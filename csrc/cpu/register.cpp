// Implementations for the dispatcher; adaselect_kernels/ops.py defines the schemas.
#include <torch/library.h>

#include "operators.h"

TORCH_LIBRARY_IMPL(adaselect, CPU, m) {
  m.impl("per_sample_stats", adaselect::per_sample_stats);
  m.impl("batch_scores", adaselect::batch_scores);
  m.impl("select_topk", adaselect::select_topk);
  m.impl("select_from_losses", adaselect::select_from_losses);
  m.impl("fused_select", adaselect::fused_select);
}
