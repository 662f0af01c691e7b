// The floor of an optimizer step: a loop with the same reads and writes and next to no arithmetic, on
// threads that each take one contiguous share. What a step takes beyond it is the rule's cost.
//
//   double stream(arrays, wide, written, narrow, narrow_written, n, threads): seconds for one pass over
//   arrays[0..wide), each of n floats, and arrays[wide..wide + narrow), each of n / 4 floats (a byte for each
//   of n); all are read, the first of each kind are written back
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// One loop a number of arrays, so that the compiler keeps all pointers in registers.
template <int kArrays>
void pass(float* const* arrays, int written, int64_t begin, int64_t end) {
  float* a[kArrays];
  for (int k = 0; k < kArrays; ++k) a[k] = arrays[k];
  for (int64_t i = begin; i < end; ++i) {
    float sum = 0;
    for (int k = 0; k < kArrays; ++k) sum += a[k][i];
    if (written > 0) a[0][i] = sum;
    if (kArrays > 1 && written > 1) a[1][i] = sum;
    if (kArrays > 2 && written > 2) a[2][i] = sum;
  }
}

void run(float* const* arrays, int count, int written, int64_t begin, int64_t end) {
  if (count == 1) return pass<1>(arrays, written, begin, end);
  if (count == 2) return pass<2>(arrays, written, begin, end);
  if (count == 3) return pass<3>(arrays, written, begin, end);
  if (count == 4) return pass<4>(arrays, written, begin, end);
  if (count == 5) return pass<5>(arrays, written, begin, end);
}

}  // namespace

extern "C" double stream(float* const* arrays, int wide, int written, int narrow,
                         int narrow_written, int64_t n, int threads) {
  std::atomic<int> ready{0};
  auto work = [&](int t) {
    ++ready;
    while (ready.load() < threads) {
    }
    const int64_t first = n * t / threads, last = n * (t + 1) / threads;
    const int64_t step = narrow > 0 ? 4096 : n;
    for (int64_t begin = first; begin < last; begin += step) {
      const int64_t end = std::min(begin + step, last);
      run(arrays, wide, written, begin, end);
      run(arrays + wide, narrow, narrow_written, begin / 4, end / 4);
    }
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  while (ready.load() < threads - 1) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  work(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
