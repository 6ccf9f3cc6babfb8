#include "cpu/sketch/sketch_outer_impl.h"

namespace lldfast {

void sketch_outer_scalar(const SketchOuterArgs& args) {
  outer(args);
}
void sketch_rows_scalar(const SketchRowsArgs& args) {
  rows(args);
}

}  // namespace lldfast
