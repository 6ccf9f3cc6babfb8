#include "cpu/logprob/logprob_impl.h"

namespace lldfast {

void logprob_forward_avx512(const LogprobArgs& args, const LogprobOut& out) {
  forward(args, out);
}
void logprob_backward_avx512(const LogprobArgs& args, const LogprobGrad& grad) {
  backward(args, grad);
}

}  // namespace lldfast
