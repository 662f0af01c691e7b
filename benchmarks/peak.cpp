// The bare dot-product loop: what this CPU's int8 units do when nothing is loaded, stored, quantized
// or scaled. The share of it that a kernel reaches says how well it feeds them.
//
//   double bare_loop(isa, threads, rounds): seconds that `threads` threads, started together, take
//   for `rounds` rounds each; bare_loop_ops(isa) is the number of operations of one round.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#define TARGET(x) __attribute__((target(x), noinline))
// Makes the accumulators look used, so that the loop is not removed.
#define KEEP(v) __asm__ volatile("" : "+v"(v))

constexpr int kChains = 16;  // independent accumulators: latency 5 times throughput 2, with room

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// 2 A, 2 B and 4 C tiles, as a matrix kernel uses them; each product is 16 x 16 x 64.
TARGET("amx-tile,amx-int8") void amx(int64_t rounds) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  __asm__ volatile("" : : "r"(&config) : "memory");  // GCC's _tile_loadconfig reads 8 bytes only
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}

TARGET("avx512f,avx512vnni") void avx512(int64_t rounds) {
  __m512i acc[kChains] = {}, a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (int64_t i = 0; i < rounds; ++i) {
    KEEP(a);
#pragma GCC unroll 16
    for (int j = 0; j < kChains; ++j) acc[j] = _mm512_dpbusd_epi32(acc[j], a, b);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kChains; ++j) KEEP(acc[j]);
}

TARGET("avx2,avxvnni") void avxvnni(int64_t rounds) {
  constexpr int kFew = 12;  // of 16 registers
  __m256i acc[kFew] = {}, a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  for (int64_t i = 0; i < rounds; ++i) {
    KEEP(a);
#pragma GCC unroll 12
    for (int j = 0; j < kFew; ++j) acc[j] = _mm256_dpbusd_avx_epi32(acc[j], a, b);
  }
#pragma GCC unroll 12
  for (int j = 0; j < kFew; ++j) KEEP(acc[j]);
}

// Without VNNI: u8 x s8 pairs to int16, pairs of those to int32, a sum. KEEP stops the compiler from
// computing the products once for all chains.
TARGET("avx2") void avx2(int64_t rounds) {
  constexpr int kFew = 8;
  __m256i acc[kFew] = {}, a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(2);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kFew; ++j) {
      KEEP(a);
      const __m256i pairs = _mm256_maddubs_epi16(a, b);
      acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(pairs, ones));
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kFew; ++j) KEEP(acc[j]);
}

struct Loop {
  const char* isa;
  void (*run)(int64_t);
  double ops;  // multiplications and additions of one round
};
constexpr Loop kLoops[] = {
    {"amx", amx, 4 * 2.0 * 16 * 16 * 64},
    {"avx512", avx512, 16 * 2.0 * 64},
    {"avxvnni", avxvnni, 12 * 2.0 * 32},
    {"avx2", avx2, 8 * 2.0 * 32},
};

const Loop* find(const char* isa) {
  for (const Loop& loop : kLoops)
    if (std::strcmp(loop.isa, isa) == 0) return &loop;
  return nullptr;
}

}  // namespace

extern "C" double bare_loop_ops(const char* isa) {
  const Loop* loop = find(isa);
  return loop ? loop->ops : 0;
}

extern "C" double bare_loop(const char* isa, int threads, int64_t rounds) {
  const Loop* loop = find(isa);
  if (!loop) return -1;
  // Linux gives AMX state to processes that ask: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  if (loop->run == amx && syscall(SYS_arch_prctl, 0x1023, 18) != 0) return -1;
  std::atomic<int> ready{0};
  auto work = [&] {
    ++ready;
    while (ready.load() < threads) {
    }
    loop->run(rounds);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  while (ready.load() < threads - 1) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  work();
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
