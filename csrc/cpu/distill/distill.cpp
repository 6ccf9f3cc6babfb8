#include "cpu/distill/distill.h"

namespace lldfast {

void distill_rows(Isa isa, const DistillArgs& args, const DistillOut& out) {
  distill_kernels(isa).rows(args, out);
}

}  // namespace lldfast
