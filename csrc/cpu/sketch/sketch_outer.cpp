#include "cpu/sketch/sketch_outer.h"

namespace lldfast {

void sketch_outer(Isa isa, const SketchOuterArgs& args) {
  sketch_outer_kernels(isa).outer(args);
}

void sketch_rows(Isa isa, const SketchRowsArgs& args) {
  sketch_outer_kernels(isa).rows(args);
}

}  // namespace lldfast
