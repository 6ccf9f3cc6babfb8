#include "cpu/sketch/sketch.h"

namespace lldfast {

void sketch_fold(Isa isa, const SketchArgs& args) {
  sketch_kernels(isa).fold(args);
}

}  // namespace lldfast
