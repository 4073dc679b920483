// Implementations for the dispatcher; adaselect_kernels/ops.py defines the schemas.
#include <torch/library.h>

#include "operators.h"

TORCH_LIBRARY_IMPL(adaselect, CPU, m) {
  m.impl("per_sample_stats", adaselect::per_sample_stats);
  m.impl("batch_scores", adaselect::batch_scores);
  m.impl("select_topk", adaselect::select_topk);
  m.impl("select_from_losses", adaselect::select_from_losses);
  m.impl("fused_select", adaselect::fused_select);
  m.impl("select_mask", adaselect::select_mask);
  m.impl("cross_entropy_backward", adaselect::cross_entropy_backward);
  m.impl("linear_loss_backward", adaselect::linear_loss_backward);
  m.impl("linear_per_sample_stats", adaselect::linear_per_sample_stats);
  m.impl("fused_linear_select", adaselect::fused_linear_select);
  m.impl("linear_partials", adaselect::linear_partials);
  m.impl("combine_partials", adaselect::combine_partials);
  m.impl("bank_select", adaselect::bank_select);
  m.impl("linear_grad_sq_norms", adaselect::linear_grad_sq_norms);
  m.impl("linear_grads_and_sq_norms", adaselect::linear_grads_and_sq_norms);
  m.impl("conv_grad_sq_norms", adaselect::conv_grad_sq_norms);
  m.impl("embedding_grad_sq_norms", adaselect::embedding_grad_sq_norms);
  m.impl("affine_grad_sq_norms", adaselect::affine_grad_sq_norms);
}
