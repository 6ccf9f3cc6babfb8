#include "cpu/logprob/logprob.h"

namespace lldfast {

void logprob_forward(Isa isa, const LogprobArgs& args, const LogprobOut& out) {
  logprob_kernels(isa).forward(args, out);
}

void logprob_backward(Isa isa, const LogprobArgs& args, const LogprobGrad& grad) {
  logprob_kernels(isa).backward(args, grad);
}

}  // namespace lldfast
