#include "cpu/distill/distill.h"

namespace lldfast {

void distill_rows(Isa isa, const DistillArgs& args, const DistillOut& out) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return distill_rows_avx512(args, out);
  if (isa >= Isa::kAvx2) return distill_rows_avx2(args, out);
#endif
  (void)isa;
  distill_rows_scalar(args, out);
}

}  // namespace lldfast
