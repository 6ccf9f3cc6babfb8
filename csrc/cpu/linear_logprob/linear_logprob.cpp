#include "cpu/linear_logprob/linear_logprob.h"

namespace lldfast {

// AMX multiplies bf16 only, so it serves what was asked for in bf16 terms; everything else is fused multiply-adds.

void linear_logprob_forward(Isa isa, const LinearLogprobArgs& args, const LogprobOut& out) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
      if (args.precision != Precision::kFp32) return linear_logprob_forward_amx(args, out);
      return linear_logprob_forward_avx512(args, out);
    case Isa::kAvx512:
      return linear_logprob_forward_avx512(args, out);
    case Isa::kAvx2:
      return linear_logprob_forward_avx2(args, out);
#endif
    default:
      return linear_logprob_forward_scalar(args, out);
  }
}

void linear_logprob_backward(Isa isa, const LinearLogprobArgs& args, const LinearLogprobGrad& grad) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
      // dz in three bf16 terms would cost three times the memory; kBf16x3 takes its gradients in fp32.
      if (args.precision == Precision::kBf16) return linear_logprob_backward_amx(args, grad);
      return linear_logprob_backward_avx512(args, grad);
    case Isa::kAvx512:
      return linear_logprob_backward_avx512(args, grad);
    case Isa::kAvx2:
      return linear_logprob_backward_avx2(args, grad);
#endif
    default:
      return linear_logprob_backward_scalar(args, grad);
  }
}

}  // namespace lldfast
