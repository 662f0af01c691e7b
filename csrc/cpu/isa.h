// Which instruction set the kernels use: the best this CPU has, capped by TRIMTAB_ISA or tt_set_isa.
#pragma once
#include <trimtab/trimtab.h>

namespace trimtab {

// The choice in force, or an error status if TRIMTAB_ISA is wrong.
tt_status current_isa(tt_isa* isa);

// AMX-BF16 beside AMX-INT8: every CPU so far that has one has both.
bool has_amx_bf16();

// AVX512-VBMI2 (vpexpandw, vpexpandb) beside what TT_ISA_AVX512 asks for.
bool has_avx512_vbmi2();

}  // namespace trimtab
