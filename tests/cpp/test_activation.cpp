// Tests of csrc/math/{dtypes,f32x1,activation}.h and csrc/cpu/{f32x8,f32x16}.h.
//
// Compiled once for each vector type (-DTT_LANES=1, 8 or 16, with that type's -m flags) and linked;
// the file for TT_LANES=1 has main() and is told by -DTT_HAVE_8, -DTT_HAVE_16 what it is linked to.
//
//   test_activation                 every 997th of the 2^32 inputs, and dense windows at the seams
//   test_activation --exhaustive [NAME]    all 2^32 inputs of every function, or one; minutes
//   test_activation eval NAME IN OUT    raw float32 files; NAME as in kNames
//   test_activation bench           nanoseconds an element
#include "vector_suite.h"

#if TT_LANES == 1
#include <chrono>
#include <cmath>
#include <string>
#include <thread>
#include <vector>

namespace {
const char* const kNames[] = {"exp", "tanh", "erf", "relu", "gelu", "gelu_tanh", "silu"};
constexpr double kMaxUlp = 4.0;
constexpr size_t kBlock = 4096;

double reference(int function, double x) {
  if (function >= kGelu && std::isinf(x)) return x > 0.0 ? x : 0.0;
  const double y = 2.0 * std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
  switch (function) {
    case kExp: return std::exp(x);
    case kTanh: return std::tanh(x);
    case kErf: return std::erf(x);
    case kRelu: return x > 0.0 ? x : 0.0;
    case kGelu: return 0.5 * x * std::erfc(-x * M_SQRT1_2);
    case kGeluTanh:
      return y >= 0.0 ? x / (1.0 + std::exp(-y)) : x * std::exp(y) / (1.0 + std::exp(y));
    default: return x >= 0.0 ? x / (1.0 + std::exp(-x)) : x * std::exp(x) / (1.0 + std::exp(x));
  }
}

// |y - exact| in units of the fp32 spacing at exact, subnormal spacing included. Inf counts as 2^128.
double ulps(float y, double exact) {
  if (std::isinf(y) && static_cast<float>(exact) == y) return 0.0;
  const double limit = 0x1p128;
  const double got = std::isinf(y) ? std::copysign(limit, y) : y;
  const double want = std::fmax(-limit, std::fmin(limit, exact));
  // 2^(exponent - 23), by the bits of the double: this line runs 3e10 times in the exhaustive mode.
  uint64_t bits;
  std::memcpy(&bits, &want, sizeof bits);
  bits = (std::clamp<uint64_t>(bits >> 52 & 2047, 1023 - 126, 1023 + 127) - 23) << 52;
  double spacing;
  std::memcpy(&spacing, &bits, sizeof spacing);
  return std::fabs(got - want) / spacing;
}

bool same(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }

struct Report {
  double max = 0.0, sum = 0.0;
  float at = 0.0f;
  uint64_t count = 0, not_same = 0, falls = 0, nan = 0;
  void add(const Report& r) {
    if (r.max > max) max = r.max, at = r.at;
    sum += r.sum, count += r.count;
    not_same += r.not_same, falls += r.falls, nan += r.nan;
  }
};

// Bit patterns first, first + stride, ... below last (exclusive), all of one sign.
void sweep(int f, const std::vector<Suite>& suites, uint64_t first, uint64_t last, uint64_t stride,
           Report* r) {
  std::vector<float> x(kBlock), y(kBlock), other(kBlock);
  float before = NAN;
  for (uint64_t start = first; start < last; start += stride * kBlock) {
    const size_t count = std::min<uint64_t>(kBlock, (last - start + stride - 1) / stride);
    for (size_t i = 0; i < kBlock; ++i) {  // the end of a short block repeats its last input
      x[i] = float_from_bits(static_cast<uint32_t>(start + stride * std::min(i, count - 1)));
    }
    suites[0].eval(f, x.data(), y.data(), kBlock);
    for (size_t s = 1; s < suites.size(); ++s) {
      suites[s].eval(f, x.data(), other.data(), kBlock);
      for (size_t i = 0; i < count; ++i) r->not_same += !same(y[i], other[i]);
    }
    for (size_t i = 0; i < count; ++i) {
      r->nan += (x[i] != x[i]) != (y[i] != y[i]);
      if (x[i] != x[i]) continue;
      const double u = ulps(y[i], reference(f, x[i]));
      if (!std::isinf(x[i]) && !(u <= r->max)) r->max = u, r->at = x[i];
      if (std::isinf(x[i]) && !(u == 0.0)) r->max = INFINITY, r->at = x[i];
      r->sum += u, ++r->count;
      const bool negative = float_bits(x[i]) >> 31;
      // |x| grows; gelu, gelu_tanh and silu rise for x >= 0 only.
      r->falls += negative ? f <= kRelu && y[i] > before : y[i] < before;
      before = y[i];
    }
  }
}

// Where a formula changes branch or exponent, or a clamp takes hold: 2^13 patterns about each.
std::vector<uint32_t> seams() {
  std::vector<uint32_t> bits = {0x2000, 0x00800000, 0x7f800000, 0x7fffe000};
  for (float x :
       {0.2f,     0.33f, 0.6f,  1.0f,   1.31f, 1.89f,  4.0f,  5.25f,  8.0f,   9.4f,  10.0f,
        10.8125f, 13.2f, 14.5f, 16.68f, 18.0f, 88.72f, 89.0f, 103.9f, 104.5f, 111.0f}) {
    bits.push_back(float_bits(x));
  }
  for (int n = 1; n <= 32; ++n) bits.push_back(float_bits(0.34657359f * static_cast<float>(n)));
  return bits;
}

Report test_function(int f, const std::vector<Suite>& suites, bool exhaustive) {
  const int threads = std::max(1u, std::thread::hardware_concurrency());
  constexpr uint64_t kChunk = uint64_t{1} << 24;  // 256 chunks; one input of overlap
  std::vector<Report> reports(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      Report local;
      for (int c = t; c < 256; c += threads) {
        const uint64_t first = c * kChunk, sign = first & 0x80000000u;
        sweep(f, suites, exhaustive && first > sign ? first - 1 : first, first + kChunk,
              exhaustive ? 1 : 997, &local);
      }
      if (!exhaustive && t == 0) {
        for (uint32_t b : seams()) {
          for (uint64_t sign : {uint64_t{0}, uint64_t{0x80000000u}}) {
            sweep(f, suites, sign + b - 0x1000, sign + b + 0x1000, 1, &local);
          }
        }
      }
      reports[t] = local;
    });
  }
  for (std::thread& thread : pool) thread.join();
  Report total;
  for (const Report& r : reports) total.add(r);
  return total;
}

// The table: falls are neighbours in the wrong order where the function rises; not same are results
// in which a vector type differs from the scalar; NaN are NaN lost or made.
bool test_functions(const std::vector<Suite>& suites, bool exhaustive, const std::string& only) {
  std::printf("%-10s %12s %8s %15s %9s %6s %9s %4s\n", "function", "inputs", "max ulp", "at",
              "mean ulp", "falls", "not same", "NaN");
  bool good = true;
  for (int f = 0; f < kFunctions; ++f) {
    if (!only.empty() && only != kNames[f]) continue;
    const Report r = test_function(f, suites, exhaustive);
    const bool monotone = r.falls == 0 || f == kGelu || f == kGeluTanh;  // these two: only counted
    const bool ok = r.max <= kMaxUlp && monotone && !r.not_same && !r.nan;
    using Count = unsigned long long;
    std::printf("%-10s %12llu %8.4f %15.9g %9.4f %6llu %9llu %4llu%s\n", kNames[f], Count(r.count),
                r.max, r.at, r.sum / double(r.count), Count(r.falls), Count(r.not_same),
                Count(r.nan), ok ? "" : "  FAILED");
    std::fflush(stdout);
    good &= ok;
  }
  return good;
}

uint32_t random_bits() {
  static uint64_t state = 88172645463325252u;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<uint32_t>(state >> 16);
}

// x rounded to `digits` significant bits, no finer than 2^lowest, in double: its own rounding is RNE.
double rounded(double x, int digits, int lowest, double largest) {
  const double unit =
      std::ldexp(1.0, std::max(x == 0.0 ? lowest : std::ilogb(x) - digits + 1, lowest));
  const double y = std::nearbyint(x / unit) * unit;
  return std::fabs(y) > largest ? std::copysign(INFINITY, x) : y;
}

bool test_narrow(bool half, const Suite& suite, bool exhaustive) {
  const uint64_t stride = exhaustive ? 17 : 997;
  uint64_t failures = 0;
  std::vector<float> x(kBlock);
  std::vector<uint16_t> bits(kBlock), scalar(kBlock);
  for (uint64_t start = 0; start < (uint64_t{1} << 32); start += stride * kBlock) {
    for (size_t i = 0; i < kBlock; ++i) {
      uint32_t u = static_cast<uint32_t>(start + stride * i);
      if (i & 1) u &= half ? 0xfffff000u : 0xffff8000u;  // ties
      x[i] = float_from_bits(u);
    }
    suite.narrow(half, x.data(), bits.data(), kBlock);
    suite_1().narrow(half, x.data(), scalar.data(), kBlock);
    for (size_t i = 0; i < kBlock; ++i) {
      failures += bits[i] != scalar[i];
      if (suite.lanes > 1) continue;
      if (x[i] != x[i]) failures += bits[i] != (half ? 0x7e00 : 0x7fc0);
      else if (std::isinf(x[i]))
        failures += bits[i] != (half ? 0x7c00 : 0x7f80) + (x[i] < 0) * 0x8000;
      else {
        const float y = half ? to_float(fp16{bits[i]}) : to_float(bf16{bits[i]});
        const double want =
            half ? rounded(x[i], 11, -24, 65504.0) : rounded(x[i], 8, -133, 0x1.fep127);
        failures += double(y) != want || std::signbit(y) != std::signbit(x[i]);
      }
    }
  }
  return failures == 0;
}

bool test_widen(bool half, const Suite& suite) {
  std::vector<uint16_t> bits(65536), back(65536);
  std::vector<float> x(65536), scalar(65536);
  for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
  suite.widen(half, bits.data(), x.data(), 65536);
  suite_1().widen(half, bits.data(), scalar.data(), 65536);
  suite.narrow(half, x.data(), back.data(), 65536);
  int failures = 0;
  for (int i = 0; i < 65536; ++i) {
    const bool nan = (i & 0x7fff) > (half ? 0x7c00 : 0x7f80);
    failures += float_bits(x[i]) != float_bits(scalar[i]) || nan != (x[i] != x[i]);
    failures += back[i] != (nan ? (half ? 0x7e00 : 0x7fc0) : i);
  }
  return failures == 0;
}

bool test_op(int op, const Suite& suite) {
  const float special[] = {0.0f,      -0.0f,     1.0f,       -1.0f,           0.5f,    2.5f,
                           -2.5f,     0x1p-149f, -0x1p-126f, 0x1.fffffep127f, 0x1p23f, INFINITY,
                           -INFINITY, NAN,       100.0f,     -101.0f};
  std::vector<float> a(1 << 16), b(1 << 16), x(1 << 16), y(1 << 16);
  for (size_t i = 0; i < a.size(); ++i) {
    const uint32_t u = random_bits();  // every other pair has like exponents, so that sums interact
    a[i] = i < 256 ? special[i / 16] : float_from_bits(u);
    b[i] = i < 256 ? special[i % 16]
                   : float_from_bits(i & 1 ? random_bits()
                                           : (random_bits() & 0x80ffffffu) | (u & 0x7f000000u));
    if (op >= 23 && i >= 256) b[i] = static_cast<float>(static_cast<int>(u % 512) - 256);
  }
  suite.op(op, a.data(), b.data(), x.data(), a.size());
  suite_1().op(op, a.data(), b.data(), y.data(), a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    if (!same(x[i], y[i]))
      return std::printf("op %d of %a and %a: %a, scalar %a\n", op, a[i], b[i], x[i], y[i]), false;
  }
  return true;
}

bool test_suite(const Suite& suite, bool exhaustive) {
  const auto result = [](bool ok) { return ok ? "ok" : "FAILED"; };
  bool ops = true;
  for (int op = 0; op < kOps; ++op) ops &= test_op(op, suite);
  const bool partial = suite.partial() == 0;
  const bool bf = test_widen(false, suite) && test_narrow(false, suite, exhaustive);
  const bool hf = test_widen(true, suite) && test_narrow(true, suite, exhaustive);
  std::printf("F32x%-2d  operations %s, partial loads and stores %s, bf16 %s, fp16 %s\n",
              suite.lanes, result(ops), result(partial), result(bf), result(hf));
  return ops && partial && bf && hf;
}

void bench(const std::vector<Suite>& suites) {
  std::vector<float> x(kBlock), y(kBlock);
  for (float& v : x) v = static_cast<float>(random_bits()) * 0x1p-29f - 4.0f;  // uniform in [-4, 4)
  for (const Suite& suite : suites) {
    for (int f = 0; f < kFunctions; ++f) {
      double best = INFINITY;
      for (int repeat = 0; repeat < 2000; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        suite.eval(f, x.data(), y.data(), kBlock);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::fmin(best, seconds.count());
      }
      std::printf("F32x%-2d %-10s %7.3f ns an element\n", suite.lanes, kNames[f],
                  best / kBlock * 1e9);
    }
  }
}

int eval_file(const std::string& name, const char* in_path, const char* out_path) {
  std::FILE* in = std::fopen(in_path, "rb");
  std::FILE* out = std::fopen(out_path, "wb");
  int f = 0;
  while (f < kFunctions && name != kNames[f]) ++f;
  if (!in || !out || f == kFunctions) return std::printf("eval: bad name or file\n"), 2;
  std::vector<float> x(kBlock), y(kBlock);
  while (const size_t count = std::fread(x.data(), sizeof(float), kBlock, in)) {
    suite_1().eval(f, x.data(), y.data(), kBlock);
    std::fwrite(y.data(), sizeof(float), count, out);
  }
  std::fclose(in);
  return std::fclose(out) != 0;
}
}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "eval" && argc == 5) return eval_file(argv[2], argv[3], argv[4]);
  std::vector<Suite> suites = {suite_1()};
#if defined(TT_HAVE_8)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("fma")) {
    suites.push_back(suite_8());
  }
#endif
#if defined(TT_HAVE_16)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    suites.push_back(suite_16());
  }
#endif
  if (mode == "bench") return bench(suites), 0;
  const bool exhaustive = mode == "--exhaustive";
  bool good = true;
  for (const Suite& suite : suites) good &= test_suite(suite, exhaustive);
  good &= test_functions(suites, exhaustive, argc > 2 ? argv[2] : "");
  std::printf(good ? "passed\n" : "FAILED\n");
  return !good;
}
#endif  // TT_LANES == 1
