#include "cpu/isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/status.h"

namespace trimtab {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avxvnni", "avx512", "amx"};
constexpr int kCount = 5;

struct CpuId {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  CpuId(unsigned leaf, unsigned subleaf) {
    if (leaf <= __get_cpuid_max(0, nullptr)) __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
  }
};

bool bits(unsigned word, unsigned mask) { return (word & mask) == mask; }

// Which register files the operating system saves (XCR0).
uint64_t saved_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Linux grants AMX's 8 KiB of tile state only to processes that ask, once: ARCH_REQ_XCOMP_PERM.
bool request_amx() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

struct Features {
  bool has[kCount] = {true, false, false, false, false};
  bool amx_bf16 = false, vbmi2 = false;
  Features() {
    const CpuId one(1, 0), seven(7, 0), seven_one(7, 1);
    if (!bits(one.ecx, bit_OSXSAVE)) return;
    const uint64_t saved = saved_state();
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
    const bool tiles = (saved & 0x60000) == 0x60000;
    has[TT_ISA_AVX2] =
        ymm && bits(one.ecx, bit_FMA | bit_F16C) && bits(seven.ebx, bit_AVX2 | bit_BMI);
    has[TT_ISA_AVXVNNI] = has[TT_ISA_AVX2] && bits(seven_one.eax, 1u << 4);
    has[TT_ISA_AVX512] =
        has[TT_ISA_AVX2] && zmm &&
        bits(seven.ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) &&
        bits(seven.ecx, bit_AVX512VNNI);
    const unsigned amx = (1u << 24) | (1u << 25);  // AMX-TILE, AMX-INT8
    has[TT_ISA_AMX] = has[TT_ISA_AVX512] && tiles && bits(seven.edx, amx) && request_amx();
    amx_bf16 = has[TT_ISA_AMX] && bits(seven.edx, 1u << 22);
    vbmi2 = has[TT_ISA_AVX512] && bits(seven.ecx, 1u << 6);
  }
};

const Features& features() {
  static const Features once;
  return once;
}

tt_isa best() {
  int isa = kCount - 1;
  while (!features().has[isa]) --isa;
  return tt_isa(isa);
}

// "" and NULL give the best. `source` says in the message where the name came from.
tt_status parse(const char* name, const char* source, tt_isa* isa) {
  if (name == nullptr || *name == 0) {
    *isa = best();
    return TT_OK;
  }
  for (int i = 0; i < kCount; ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    if (!features().has[i]) {
      return set_error(TT_UNSUPPORTED, "%s: this CPU has no \"%s\"; the best it has is \"%s\"",
                       source, name, kNames[best()]);
    }
    *isa = tt_isa(i);
    return TT_OK;
  }
  return set_error(TT_INVALID_ARGUMENT,
                   "%s: expected scalar, avx2, avxvnni, avx512 or amx, got \"%.40s\"", source,
                   name);
}

std::atomic<int> chosen{-1};  // -1: not read yet

}  // namespace

bool has_amx_bf16() { return features().amx_bf16; }

bool has_avx512_vbmi2() { return features().vbmi2; }

tt_status current_isa(tt_isa* isa) {
  int now = chosen.load(std::memory_order_relaxed);
  if (now < 0) {
    tt_isa parsed;
    const tt_status status = parse(std::getenv("TRIMTAB_ISA"), "TRIMTAB_ISA", &parsed);
    if (status != TT_OK) return status;
    chosen.store(now = parsed, std::memory_order_relaxed);
  }
  *isa = tt_isa(now);
  return TT_OK;
}

}  // namespace trimtab

tt_status tt_get_isa(tt_isa* isa) { return trimtab::current_isa(isa); }

tt_status tt_set_isa(const char* name) {
  const bool reset = name == nullptr || *name == 0;
  tt_isa parsed = TT_ISA_SCALAR;
  const tt_status status = reset ? TT_OK : trimtab::parse(name, "set_isa", &parsed);
  if (status == TT_OK) trimtab::chosen.store(reset ? -1 : int(parsed), std::memory_order_relaxed);
  return status;
}

const char* tt_isa_name(tt_isa isa) {
  return isa >= 0 && isa < trimtab::kCount ? trimtab::kNames[isa] : "unknown";
}

int32_t tt_isa_available(tt_isa isa) {
  return isa >= 0 && isa < trimtab::kCount && trimtab::features().has[isa];
}
