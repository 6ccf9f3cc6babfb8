#include "dispatch.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lldfast {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

#if defined(__x86_64__)
bool has_bit(uint32_t word, int bit) {
  return (word >> bit) & 1u;
}

// XCR0: which register states the operating system saves. Without them the instructions fault even where CPUID has
// them.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux grants the 8 KB tile state only to a process that asks for it.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;
  const bool fma = has_bit(ecx, 12), osxsave = has_bit(ecx, 27);
  if (!osxsave || !fma) return Isa::kScalar;
  const uint64_t saved = saved_states();
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::kScalar;

  const bool ymm = (saved & 0x6) == 0x6;
  if (!ymm || !has_bit(ebx, 5)) return Isa::kScalar;
  const bool zmm = (saved & 0xe6) == 0xe6;
  const bool f = has_bit(ebx, 16), dq = has_bit(ebx, 17), bw = has_bit(ebx, 30), vl = has_bit(ebx, 31);
  if (!zmm || !f || !dq || !bw || !vl) return Isa::kAvx2;
  const bool tiles = (saved & 0x60000) == 0x60000;
  const bool amx_bf16 = has_bit(edx, 22), amx_tile = has_bit(edx, 24);
  if (!tiles || !amx_bf16 || !amx_tile) return Isa::kAvx512;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return Isa::kAvx512;
  const bool avx512_bf16 = has_bit(eax, 5);
  if (!avx512_bf16 || !request_tiles()) return Isa::kAvx512;
  return Isa::kAmx;
}
#else
Isa best_isa() {
  return Isa::kScalar;
}
#endif

std::string join(const std::vector<Isa>& isas) {
  std::string names;
  for (Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

Isa choose() {
  const char* wanted = std::getenv("LLDFAST_ISA");
  const std::vector<Isa>& supported = supported_isas();
  if (wanted == nullptr || *wanted == '\0') return supported.back();
  for (Isa isa : supported) {
    if (wanted == std::string(isa_name(isa))) return isa;
  }
  for (Isa isa : kAll) {
    if (wanted == std::string(isa_name(isa))) {
      throw std::invalid_argument("LLDFAST_ISA=" + std::string(wanted) + ": this machine supports " + join(supported));
    }
  }
  throw std::invalid_argument("LLDFAST_ISA=" + std::string(wanted) + " is unknown; choose scalar, avx2, avx512 or amx");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
    default:
      return "scalar";
  }
}

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> supported = [] {
    std::vector<Isa> list;
    const Isa best = best_isa();
    for (Isa isa : kAll) {
      if (isa <= best) list.push_back(isa);
    }
    return list;
  }();
  return supported;
}

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace lldfast
