// How a product's tasks are dealt out to threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace trimtab {
namespace {

// Tasks [0, n) in equal shares, one a thread: the same thread meets the same part of the weight at
// every call, and finds it in its L2. A thread that is done takes from the others' shares, so that a
// delayed one does not hold up the call.
struct Shares {
  static constexpr int64_t kMost = 64;
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  Share share[kMost];
  int64_t count;

  Shares(int64_t n, int threads) : count(std::min<int64_t>({int64_t(threads), kMost, n})) {
    for (int64_t i = 0; i < count; ++i) {
      share[i].next.store(n * i / count, std::memory_order_relaxed);
      share[i].end = n * (i + 1) / count;
    }
  }

  // The next task for this thread; -1 when none is left.
  int64_t take(int64_t thread) {
    for (int64_t i = 0; i < count; ++i) {
      Share& from = share[(thread + i) % count];
      if (from.next.load(std::memory_order_relaxed) >= from.end) continue;
      const int64_t task = from.next.fetch_add(1, std::memory_order_relaxed);
      if (task < from.end) return task;
    }
    return -1;
  }
};

}  // namespace
}  // namespace trimtab
