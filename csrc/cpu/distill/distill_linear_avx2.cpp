#include "cpu/common/fma_engine.h"
#include "cpu/distill/distill_linear_impl.h"

namespace lldfast {

void distill_linear_avx2(const DistillLinearArgs& args, const DistillLinearOut& out) {
  distill_linear<FmaEngine>(args, out);
}

}  // namespace lldfast
