#include "cpu/sketch/sketch.h"

namespace lldfast {

void sketch_fold(Isa isa, const SketchArgs& args) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return sketch_fold_avx512(args);
  if (isa >= Isa::kAvx2) return sketch_fold_avx2(args);
#endif
  (void)isa;
  sketch_fold_scalar(args);
}

}  // namespace lldfast
