// Runs a lambda over [0, n) on the pool that the caller injected.
#pragma once
#include <trimtab/trimtab.h>

#include <type_traits>

namespace trimtab {

// The caller's pool, or the calling thread alone where there is none or the work does not pay for
// waking others (about 5 us).
inline tt_parallel pool_or_serial(const tt_parallel* parallel, bool worth = true) {
  return parallel != nullptr && worth ? *parallel : tt_parallel{nullptr, nullptr, 1};
}

template <class F>
void parallel_run(const tt_parallel& pool, int64_t n, F&& body) {
  if (pool.run == nullptr || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  using Body = typename std::remove_reference<F>::type;
  pool.run(
      pool.pool, n, [](void* ctx, int64_t i) { (*static_cast<Body*>(ctx))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace trimtab
