#include "cpu/logprob/logprob.h"

namespace lldfast {

void logprob_forward(Isa isa, const LogprobArgs& args, const LogprobOut& out) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return logprob_forward_avx512(args, out);
  if (isa >= Isa::kAvx2) return logprob_forward_avx2(args, out);
#endif
  (void)isa;
  logprob_forward_scalar(args, out);
}

void logprob_backward(Isa isa, const LogprobArgs& args, const LogprobGrad& grad) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return logprob_backward_avx512(args, grad);
  if (isa >= Isa::kAvx2) return logprob_backward_avx2(args, grad);
#endif
  (void)isa;
  logprob_backward_scalar(args, grad);
}

}  // namespace lldfast
