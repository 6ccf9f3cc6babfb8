#include "cpu/sketch/sketch_outer_impl.h"

namespace lldfast {

void sketch_outer_avx2(const SketchOuterArgs& args) {
  outer(args);
}
void sketch_rows_avx2(const SketchRowsArgs& args) {
  rows(args);
}

}  // namespace lldfast
