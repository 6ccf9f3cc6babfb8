#include "cpu/sketch/sketch_outer.h"

namespace lldfast {

void sketch_outer(Isa isa, const SketchOuterArgs& args) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return sketch_outer_avx512(args);
  if (isa >= Isa::kAvx2) return sketch_outer_avx2(args);
#endif
  (void)isa;
  sketch_outer_scalar(args);
}

void sketch_rows(Isa isa, const SketchRowsArgs& args) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return sketch_rows_avx512(args);
  if (isa >= Isa::kAvx2) return sketch_rows_avx2(args);
#endif
  (void)isa;
  sketch_rows_scalar(args);
}

}  // namespace lldfast
