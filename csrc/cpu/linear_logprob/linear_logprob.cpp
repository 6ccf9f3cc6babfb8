#include "cpu/linear_logprob/linear_logprob.h"

namespace lldfast {
namespace {

// AMX multiplies bf16 only, so it serves what was asked for in bf16 terms; everything else is fused multiply-adds.
const LinearLogprobKernels& kernels(Isa isa, bool in_bf16_terms) {
  return linear_logprob_kernels(in_bf16_terms || isa < Isa::kAvx512 ? isa : Isa::kAvx512);
}

}  // namespace

void linear_logprob_forward(Isa isa, const LinearLogprobArgs& args, const LogprobOut& out) {
  kernels(isa, args.precision != Precision::kFp32).forward(args, out);
}

void linear_logprob_backward(Isa isa, const LinearLogprobArgs& args, const LinearLogprobGrad& grad) {
  // dz in three bf16 terms would cost three times the memory; kBf16x3 takes its gradients in fp32.
  kernels(isa, args.precision == Precision::kBf16).backward(args, grad);
}

}  // namespace lldfast
