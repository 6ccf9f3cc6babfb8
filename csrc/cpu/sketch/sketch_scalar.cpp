#include "cpu/sketch/sketch_impl.h"

namespace lldfast {

void sketch_fold_scalar(const SketchArgs& args) {
  fold(args);
}

}  // namespace lldfast
