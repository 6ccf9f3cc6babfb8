#include "cpu/distill/distill_impl.h"

namespace lldfast {

void distill_rows_scalar(const DistillArgs& args, const DistillOut& out) {
  rows(args, out);
}

}  // namespace lldfast
