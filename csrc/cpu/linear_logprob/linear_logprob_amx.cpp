#include "cpu/common/amx_engine.h"
#include "cpu/linear_logprob/linear_logprob_impl.h"

namespace lldfast {

void linear_logprob_forward_amx(const LinearLogprobArgs& args, const LogprobOut& out) {
  if (args.precision == Precision::kBf16x3) return forward<AmxEngine<3>>(args, out);
  forward<AmxEngine<1>>(args, out);
}

void linear_logprob_backward_amx(const LinearLogprobArgs& args, const LinearLogprobGrad& grad) {
  backward<AmxEngine<1>>(args, grad);
}

}  // namespace lldfast
