// Rows over threads for the ops that compute a row in fp32 and quantize it.
#pragma once
#include <algorithm>
#include <atomic>

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/status.h"

namespace trimtab {

// row(m, y) for every m < M; y: scratch of K floats.
template <class Row>
tt_status run_quantize_rows(const char* op, int64_t M, int64_t K, const tt_parallel* parallel,
                            const Row& row) {
  // A task is about 32 K elements: 10 us and more, several times what waking a thread costs.
  const int64_t rows_a_task = K > 0 ? (32768 + K - 1) / K : std::max<int64_t>(M, 1);
  const int64_t tasks = (M + rows_a_task - 1) / rows_a_task;
  std::atomic<bool> no_memory{false};
  parallel_run(pool_or_serial(parallel), tasks, [&](int64_t task) {
    float* y = static_cast<float*>(thread_scratch(K * 4 + 64, Scratch::kRow));
    if (y == nullptr) {
      no_memory.store(true, std::memory_order_relaxed);
      return;
    }
    const int64_t end = std::min((task + 1) * rows_a_task, M);
    for (int64_t m = task * rows_a_task; m < end; ++m) row(m, y);
  });
  if (!no_memory.load()) return TT_OK;
  return set_error(TT_OUT_OF_MEMORY, "%s: no memory for %lld bytes of scratch a thread", op,
                   (long long)(K * 4));
}

}  // namespace trimtab
