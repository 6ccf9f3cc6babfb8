#include "cpu/sketch/sketch_impl.h"

namespace lldfast {

void sketch_fold_avx2(const SketchArgs& args) {
  fold(args);
}

}  // namespace lldfast
