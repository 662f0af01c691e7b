// Random calls of the CUDA ops on the SIMT machine, against plain loops: for tests/test_simt.py, under the
// address sanitizer and with kernels that were spoiled on purpose.
//
//   driver op arch calls seed mutant
//     op      how the names of kChecks begin, or all          arch    80, 90, or 0 for both in turn
//     mutant  the fault that is switched on; 0: none
//
// Ends with 1 and a sentence at the first wrong result or fault.
#include <trimtab/int8_linear.h>
#include <trimtab/int8_weight_mm.h>
#include <trimtab/quantize_int8.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "math/activation.h"
#include "math/epilogue.h"
#include "math/f32x1.h"

extern "C" {
void simt_register(const void* p, int64_t bytes, int writable);
void simt_clear(void);
void simt_configure(uint64_t seed, int arch, int sm_count, int policy);
void simt_mutate(int mutant);
tt_status simt_product(const int8_t* a, const int8_t* b, int32_t* out, uint32_t* total, int M,
                       int N, int K);
}

namespace trimtab {
namespace {

std::mt19937_64 chance;

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(chance);
}

// A tensor of exactly its size on the heap, registered for the next call, red zones around it.
template <class T>
class Array {
 public:
  explicit Array(int64_t n, bool writable = false) : n_(n) {
    const size_t bytes = (size_t(n) * sizeof(T) + 255) / 256 * 256 + 256;
    whole_ = static_cast<char*>(std::aligned_alloc(256, bytes));
    // The end of the allocation is the end of the tensor, where alignment allows it.
    data_ = reinterpret_cast<T*>(whole_);
    std::memset(whole_, 0xa5, bytes);
    simt_register(data_, n * int64_t(sizeof(T)), writable);
  }
  Array(const Array&) = delete;
  ~Array() { std::free(whole_); }
  T& operator[](int64_t i) { return data_[i]; }
  T* data() { return data_; }
  int64_t size() const { return n_; }

 private:
  int64_t n_;
  char* whole_;
  T* data_;
};

[[noreturn]] void fail(const char* what, int64_t M, int64_t N, int64_t K) {
  std::printf("%s of M %lld, N %lld, K %lld\n", what, (long long)M, (long long)N, (long long)K);
  std::exit(1);
}

void expect_ok(tt_status status, int64_t M, int64_t N, int64_t K) {
  if (status != TT_OK) fail(tt_last_error(), M, N, K);
}

bool same(float a, float b) {
  return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b));
}

void fill(Array<int8_t>& a) {
  for (int64_t i = 0; i < a.size(); ++i) a[i] = int8_t(between(-128, 127));
}
void fill(Array<float>& a, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  for (int64_t i = 0; i < a.size(); ++i) a[i] = normal(chance);
}

// One row as NUMERICS.md section 2 writes it.
void quantize_row(const float* x, int64_t K, int8_t* q, float* scale) {
  float most = 0.0f;
  for (int64_t k = 0; k < K; ++k) most = std::fmax(most, std::fabs(x[k]));
  const float inverse = most == 0.0f ? 0.0f : 127.0f / most;
  *scale = most / 127.0f;
  for (int64_t k = 0; k < K; ++k) q[k] = int8_t(std::nearbyintf(x[k] * inverse));
}

int32_t dot(const int8_t* a, const int8_t* b, int64_t K) {
  int32_t sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += int32_t(a[k]) * b[k];
  return sum;
}

struct Shape {
  int64_t M, N, K, stride;  // of a and b
};

// Small and large ones; rows one after another or, three times of four, on 16 bytes as tensor cores want.
Shape shape(int64_t most) {
  Shape s = {between(1, between(1, most)), between(1, between(1, most)),
             between(1, between(1, 16 * most)), 0};
  s.stride = between(0, 3) == 0 ? s.K : (s.K + 15) / 16 * 16;
  return s;
}

void check_quantize(const Shape& any) {
  const Shape s = {any.M % 20 + 1, 0, any.K, 0};
  Array<float> x(s.M * s.K), scale(s.M, true);
  Array<int8_t> q(s.M * s.K, true);
  fill(x, 3.0f);
  expect_ok(
      tt_quantize_int8_cuda(x.data(), TT_F32, s.K, s.M, s.K, q.data(), s.K, scale.data(), nullptr),
      s.M, 0, s.K);
  std::vector<int8_t> want(size_t(s.K));
  for (int64_t m = 0; m < s.M; ++m) {
    float want_scale = 0.0f;
    quantize_row(&x[m * s.K], s.K, want.data(), &want_scale);
    if (!same(scale[m], want_scale) || std::memcmp(&q[m * s.K], want.data(), want.size()) != 0)
      fail("quantize_int8 is wrong", s.M, 0, s.K);
  }
}

// What the products share: a weight in rows s.stride apart, scales, a bias.
struct Weight {
  Array<int8_t> b;
  Array<float> b_scale, bias;
  explicit Weight(const Shape& s) : b((s.N - 1) * s.stride + s.K), b_scale(s.N), bias(s.N) {
    fill(b), fill(b_scale, 0.01f), fill(bias, 1.0f);
  }
  tt_epilogue epilogue(Array<float>& out, int64_t N) {
    return {b_scale.data(), bias.data(), TT_F32, TT_ACT_RELU, out.data(), N, TT_F32};
  }
};

void check_product(const Shape& s, const int8_t* a, int64_t a_stride, const float* a_scale,
                   Weight& w, Array<float>& out, const char* what) {
  for (int64_t m = 0; m < s.M; ++m)
    for (int64_t n = 0; n < s.N; ++n) {
      const float sum = float(dot(a + m * a_stride, &w.b[n * s.stride], s.K));
      const F32x1 want = epilogue<Activation::relu>(F32x1(sum), F32x1(a_scale[m]),
                                                    F32x1(w.b_scale[n]), F32x1(w.bias[n]));
      if (!same(out[m * s.N + n], want.v)) fail(what, s.M, s.N, s.K);
    }
}

void check_int8_mm(const Shape& s) {
  Array<int8_t> a((s.M - 1) * s.stride + s.K),
      space(tt_int8_mm_cuda_workspace(s.M, s.N, s.K), true);
  Array<float> a_scale(s.M), out(s.M * s.N, true);
  Weight w(s);
  fill(a), fill(a_scale, 0.01f);
  const tt_epilogue epilogue = w.epilogue(out, s.N);
  expect_ok(tt_int8_mm_cuda(a.data(), s.stride, a_scale.data(), w.b.data(), s.stride, s.M, s.N, s.K,
                            &epilogue, space.size() != 0 ? space.data() : nullptr, nullptr),
            s.M, s.N, s.K);
  check_product(s, a.data(), s.stride, a_scale.data(), w, out, "int8_mm is wrong");
}

// Few outputs on many multiprocessors: K is shared out among blocks.
void check_int8_mm_split(const Shape& any) {
  Shape s = {17 + any.M % 30, 1 + any.N % 70, 1024 + any.K % 1500, 0};
  s.stride = (s.K + 15) / 16 * 16;
  check_int8_mm(s);
}

void check_int8_mm_small(const Shape& any) {
  Shape s = any;
  s.M = 1 + any.M % 16;
  check_int8_mm(s);
}

void check_int8_linear(const Shape& s) {
  Array<float> x(s.M * s.K), out(s.M * s.N, true);
  Array<int8_t> space(tt_int8_linear_cuda_workspace(s.M, s.N, s.K), true);
  Weight w(s);
  fill(x, 2.0f);
  const tt_epilogue epilogue = w.epilogue(out, s.N);
  expect_ok(tt_int8_linear_cuda(x.data(), TT_F32, s.K, w.b.data(), s.stride, s.M, s.N, s.K,
                                &epilogue, space.size() != 0 ? space.data() : nullptr, nullptr),
            s.M, s.N, s.K);
  std::vector<int8_t> q(size_t(s.M * s.K));
  std::vector<float> scale(size_t(s.M));
  for (int64_t m = 0; m < s.M; ++m)
    quantize_row(&x[m * s.K], s.K, &q[size_t(m * s.K)], &scale[size_t(m)]);
  check_product(s, q.data(), s.K, scale.data(), w, out, "int8_linear is wrong");
}

void check_int8_weight_mm(const Shape& s) {
  Array<float> x(s.M * s.K), out(s.M * s.N, true);
  Weight w(s);
  fill(x, 1.0f);
  tt_epilogue epilogue = w.epilogue(out, s.N);
  epilogue.bias = nullptr;
  epilogue.activation = TT_ACT_NONE;
  expect_ok(tt_int8_weight_mm_cuda(x.data(), TT_F32, s.K, w.b.data(), s.stride, s.K, nullptr, s.M,
                                   s.N, s.K, &epilogue, nullptr),
            s.M, s.N, s.K);
  for (int64_t m = 0; m < s.M; ++m)
    for (int64_t n = 0; n < s.N; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < s.K; ++k) {
        const double term = double(x[m * s.K + k]) * w.b[n * s.stride + k];
        sum += term, size += std::fabs(term);
      }
      const double scale = w.b_scale[n], error = std::fabs(double(out[m * s.N + n]) - sum * scale);
      if (!(error <= 1e-5 * size * std::fabs(scale)))
        fail("int8_weight_mm is wrong", s.M, s.N, s.K);
    }
}

void check_selftest(const Shape& s) {
  const int64_t K = (s.K + 15) / 16 * 16;
  Array<int8_t> a(s.M * K), b(s.N * K);
  Array<int32_t> out(s.M * s.N, true);
  Array<uint32_t> total(1, true);
  fill(a), fill(b);
  total[0] = 0;
  expect_ok(simt_product(a.data(), b.data(), out.data(), total.data(), int(s.M), int(s.N), int(K)),
            s.M, s.N, K);
  uint32_t sum = 0;
  for (int64_t i = 0; i < s.M * s.N; ++i) {
    const int32_t want = dot(&a[i / s.N * K], &b[i % s.N * K], K);
    if (out[i] != want) fail("product is wrong", s.M, s.N, K);
    sum += uint32_t(want);
  }
  if (total[0] != sum) fail("the total of product is wrong", s.M, s.N, K);
}

struct Check {
  const char* op;
  void (*run)(const Shape&);
  int64_t most;  // rows and columns; a sixteenth of K
  int sm_count = 3;
};

constexpr Check kChecks[] = {{"quantize_int8", check_quantize, 300},
                             {"int8_mm", check_int8_mm, 250},
                             {"int8_mm_split", check_int8_mm_split, 250, 40},
                             {"int8_mm_small", check_int8_mm_small, 250},
                             {"int8_linear", check_int8_linear, 250},
                             {"int8_weight_mm", check_int8_weight_mm, 64},
                             {"product", check_selftest, 100}};
constexpr int kChecksCount = sizeof kChecks / sizeof kChecks[0];

// Those whose name begins with op take turns; all of them do for "all".
const Check& find(const char* op, int64_t call) {
  const size_t length = std::strcmp(op, "all") == 0 ? 0 : std::strlen(op);
  const Check* found[kChecksCount];
  int count = 0;
  for (const Check& check : kChecks)
    if (std::strncmp(op, check.op, length) == 0) found[count++] = &check;
  if (count == 0) std::printf("driver: no op %s\n", op), std::exit(2);
  return *found[call % count];
}

}  // namespace
}  // namespace trimtab

int main(int count, char** arguments) {
  using namespace trimtab;
  if (count != 6) return std::printf("driver op arch calls seed mutant\n"), 2;
  const int arch = std::atoi(arguments[2]), calls = std::atoi(arguments[3]);
  chance.seed(std::strtoull(arguments[4], nullptr, 10));
  simt_mutate(std::atoi(arguments[5]));
  for (int64_t call = 0; call < calls; ++call) {
    const Check& check = find(arguments[1], call);
    const int now = arch != 0 ? arch : call / kChecksCount % 2 == 0 ? 80 : 90;
    simt_clear();
    // sm_90 kernels have as many blocks as multiprocessors, of many threads: 40 take seconds.
    simt_configure(chance(), now, now == 80 ? check.sm_count : 3, -1);
    check.run(shape(check.most));
  }
}
