#include "cpu/sketch/sketch_impl.h"

namespace lldfast {

void sketch_fold_avx512(const SketchArgs& args) {
  fold(args);
}

}  // namespace lldfast
