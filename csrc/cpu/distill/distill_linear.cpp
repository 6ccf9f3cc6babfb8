#include "cpu/distill/distill_linear.h"

namespace lldfast {

void distill_linear(Isa isa, const DistillLinearArgs& args, const DistillLinearOut& out) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
      if (args.student.precision == Precision::kBf16 && args.teacher.precision == Precision::kBf16) {
        return distill_linear_amx(args, out);
      }
      return distill_linear_avx512(args, out);
    case Isa::kAvx512:
      return distill_linear_avx512(args, out);
    case Isa::kAvx2:
      return distill_linear_avx2(args, out);
#endif
    default:
      return distill_linear_scalar(args, out);
  }
}

}  // namespace lldfast
