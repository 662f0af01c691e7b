// A row of sparse24_compress, an instruction set a file; and the tables that they share.
#pragma once
#include <trimtab/trimtab.h>

#include "math/sparse24.h"

namespace trimtab {

// values [K4 / 2], indices [ceil(K4 / 8)] of weight [K]. False if there is a NaN; the outputs are then of no
// use.
using Sparse24RowFn = bool (*)(const void* weight, tt_dtype dtype, int64_t K, void* values,
                               uint8_t* indices);

bool sparse24_row_scalar(const void*, tt_dtype, int64_t, void*, uint8_t*);
bool sparse24_row_avx2(const void*, tt_dtype, int64_t, void*, uint8_t*);
bool sparse24_row_avx512(const void*, tt_dtype, int64_t, void*, uint8_t*);  // with VBMI2

namespace {

// Mask of a group (which of four stay) -> code of a group (their two positions); 0 -> 0.
constexpr uint8_t code_of_mask(int mask) {
  int low = 0, high = 3;
  while (low < 4 && !(mask >> low & 1)) ++low;
  while (high >= 0 && !(mask >> high & 1)) --high;
  return mask == 0 ? 0 : uint8_t(low | high << 2);
}

// The codes of all masks, as a byte shuffle looks them up.
struct CodeTable {
  alignas(16) uint8_t of[16];
  constexpr CodeTable() : of{} {
    for (int mask = 0; mask < 16; ++mask) of[mask] = code_of_mask(mask);
  }
};

// The last groups of a row, one by one: fewer than a vector holds. `done` weights come before them.
template <class T>
bool sparse24_groups(const T* weight, int64_t done, int64_t K, T* values, uint8_t* indices) {
  bool sound = true;
  for (int64_t k = done; k < K; k += 4) {
    T w[4] = {};
    uint32_t s[4] = {};
    for (int i = 0; i < 4 && k + i < K; ++i) {
      w[i] = weight[k + i];
      s[i] = score24(w[i]);
      sound = sound && (Score24<T>::kInf == 0 || s[i] <= Score24<T>::kInf);
    }
    const uint32_t code = code24(s[0], s[1], s[2], s[3]);
    values[k / 2] = w[code & 3];
    values[k / 2 + 1] = w[code >> 2];
    uint8_t& byte = indices[k / 8];
    byte = uint8_t(k % 8 == 0 ? code : byte | code << 4);
  }
  return sound;
}

}  // namespace
}  // namespace trimtab
