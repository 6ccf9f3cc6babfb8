#include "cpu/logprob/logprob_impl.h"

namespace lldfast {

void logprob_forward_scalar(const LogprobArgs& args, const LogprobOut& out) {
  forward(args, out);
}
void logprob_backward_scalar(const LogprobArgs& args, const LogprobGrad& grad) {
  backward(args, grad);
}

}  // namespace lldfast
