// Which instruction set runs here. Each kernel asks once and keeps the function it got.
#pragma once

#include <string>
#include <vector>

namespace lldfast {

// In rising order: a machine that has one has all before it.
enum class Isa { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

const char* isa_name(Isa isa);

// What this processor and operating system support, in rising order; the first is always scalar.
const std::vector<Isa>& supported_isas();

// The best supported set, or the one that LLDFAST_ISA names. The variable is read at the first call.
// Throws std::invalid_argument when it names an unknown set, or one that this machine lacks.
Isa active_isa();

}  // namespace lldfast
