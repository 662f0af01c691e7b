// Portable C++: any CPU, and the plain statement of what the other kernels compute.
#include "cpu/block_linear_lanes.h"

namespace trimtab {
namespace {

template <class T>
struct Float {
  using Weight = T;
  struct X {
    float v[kSparseM];
  };
  using Acc = X;
  using W = float;
  static constexpr int kVectors = 1, kTileN = 1, kTileP = 1;
  static constexpr bool kUnsigned = false;
  static Acc begin(int32_t) { return {}; }
  static X load(const char* p) {
    X x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static W broadcast(const float* p) { return *p; }
  static W broadcast(const bf16* p) { return to_float(*p); }
  static W broadcast(const fp16* p) { return to_float(*p); }
  static Acc dot(Acc acc, const X& x, W w) {
    for (int m = 0; m < kSparseM; ++m) acc.v[m] += x.v[m] * w;
    return acc;
  }
  static void store(char* p, const Acc& acc) { std::memcpy(p, &acc, sizeof acc); }
};

struct Int8 {
  using Weight = int8_t;
  struct X {
    int8_t v[kSparseM][4];
  };
  struct Acc {
    int32_t v[kSparseM];
  };
  using W = int32_t;
  static constexpr int kVectors = 1, kTileN = 1, kTileP = 1;
  static constexpr bool kUnsigned = false;
  static Acc begin(int32_t start) {
    Acc acc;
    for (int m = 0; m < kSparseM; ++m) acc.v[m] = start;
    return acc;
  }
  static X load(const char* p) {
    X x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return four;
  }
  static W broadcast_dword(int32_t dword) { return dword; }
  static Acc dot(Acc acc, const X& x, W w) {
    int8_t weight[4];
    std::memcpy(weight, &w, 4);
    for (int m = 0; m < kSparseM; ++m)
      for (int i = 0; i < 4; ++i) acc.v[m] += int32_t(x.v[m][i]) * weight[i];
    return acc;
  }
  static void store(char* p, const Acc& acc) { std::memcpy(p, &acc, sizeof acc); }
};

}  // namespace

BlockKernel block_kernel_scalar(const tt_block_weight& weight) {
  return lanes_kernel<Float, Int8>(weight);
}

}  // namespace trimtab
