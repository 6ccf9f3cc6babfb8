#include "cpu/distill_linear_impl.h"
#include "cpu/fma_engine.h"

namespace lldfast {

void distill_linear_scalar(const DistillLinearArgs& args, const DistillLinearOut& out) {
  distill_linear<FmaEngine>(args, out);
}

}  // namespace lldfast
