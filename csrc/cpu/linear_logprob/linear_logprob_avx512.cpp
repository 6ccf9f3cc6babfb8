#include "cpu/common/fma_engine.h"
#include "cpu/linear_logprob/linear_logprob_impl.h"

namespace lldfast {

void linear_logprob_forward_avx512(const LinearLogprobArgs& args, const LogprobOut& out) {
  forward<FmaEngine>(args, out);
}

void linear_logprob_backward_avx512(const LinearLogprobArgs& args, const LinearLogprobGrad& grad) {
  backward<FmaEngine>(args, grad);
}

}  // namespace lldfast
