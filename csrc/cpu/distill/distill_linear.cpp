#include "cpu/distill/distill_linear.h"

namespace lldfast {

// AMX multiplies bf16 only, so it serves where both models were asked for in bf16.
void distill_linear(Isa isa, const DistillLinearArgs& args, const DistillLinearOut& out) {
  const bool in_bf16 = args.student.precision == Precision::kBf16 && args.teacher.precision == Precision::kBf16;
  distill_linear_kernels(in_bf16 || isa < Isa::kAvx512 ? isa : Isa::kAvx512).loss(args, out);
}

}  // namespace lldfast
