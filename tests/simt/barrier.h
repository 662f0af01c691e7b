// The sixteen barriers of a block.
#pragma once
#include "simt/core.h"

namespace simt {

// Joins barrier `id` of `threads` threads; returns when all have come, or at once if this one only
// arrives. Barrier 0 takes all threads of the block.
inline void join_barrier(int id, int threads, bool waits, const char* what, Where where) {
  Thread& me = self();
  Block& block = *me.block;
  if (threads <= 0 || threads > int(block.threads.size()) || (id != 0 && threads % 32 != 0))
    fault(where, "%s %d of %d threads: expected a multiple of 32, at most the block's %zu", what,
          id, threads, block.threads.size());
  Barrier& b = block.barriers[id];
  if (b.threads == 0) {
    b.threads = unsigned(threads), b.where = where, b.arrived = 0;
    if (id == 0 && block.exited != 0)
      fault(where, "divergent barrier: %s after %u threads of the block have exited", what,
            block.exited);
  } else if (b.threads != unsigned(threads)) {
    fault(where, "%s %d of %d threads, while %s waits with %u", what, id, threads,
          name(b.where).c_str(), b.threads);
  }
  if (me.arrived_in[id] == b.phase)
    fault(where, "%s %d: this thread has already arrived in this phase", what, id);
  me.arrived_in[id] = b.phase;
  if (++b.arrived == b.threads) {
    for (Thread* t : b.waiting) wake(t);
    b.threads = 0, ++b.phase;
    b.waiting.clear();
    return maybe_yield();
  }
  if (!waits) return maybe_yield();
  b.waiting.push_back(&me);
  wait(what, where);
}

inline void check_named_barrier(int id, Where where) {
  if (id < 1 || id > 15) fault(where, "named barrier %d: expected 1 to 15", id);
}

// A thread that exits while others wait for all threads of the block.
inline void check_barriers_at_exit() {
  const Barrier& b = self().block->barriers[0];
  if (b.threads != 0)
    fault(b.where, "divergent barrier: __syncthreads waits for a thread that exits: thread %u",
          self().rank);
}

}  // namespace simt

inline void __syncthreads(SIMT_WHERE) {
  simt::join_barrier(0, int(simt::self().block->threads.size()), true, "__syncthreads", where);
}
