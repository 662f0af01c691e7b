// The SIMT machine: runs kernels of csrc/cuda, compiled by the host's compiler, on one CPU thread. Every
// CUDA thread is a fiber, and whatever CUDA leaves open is decided against the kernel:
//
//   - which thread runs next, and which block, is drawn by a seed; now and then a warp is so slow that it
//     runs only where nothing else can;
//   - asynchronous work (cp.async, TMA, wgmma) is done at the last legal moment, at once, or somewhere
//     between (Policy), so that a missing wait and a stage reused too early both change bits;
//   - shared memory, stacks and registers start as garbage;
//   - global memory is what the test registered, to the byte.
//
// All blocks of a cluster run at the same time, and up to three clusters, as drawn. What a kernel does wrong in a
// way that can be seen is a fault: the launch ends and its launcher returns TT_CUDA_ERROR with the op,
// block, thread and line.
//
//   fiber.h    stacks and switches          barrier.h  __syncthreads, named barriers
//   memory.h   global ranges, shared memory warp.h     operations of a warp or warpgroup
//   core.h     threads, scheduler, launch   ptx.h      csrc/cuda/ptx.cuh; sm90.h ptx_sm90.cuh
#pragma once
#include <trimtab/trimtab.h>
#include <xmmintrin.h>

#include <algorithm>
#include <cstdarg>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/memory.h"
#include "simt/types.h"

namespace trimtab {
tt_status set_error(tt_status status, const char* format, ...)
    __attribute__((format(printf, 2, 3), cold));
}

namespace simt {

// The line of a kernel that something happened at. Every wrapper takes it as its last argument.
struct Where {
  const char* file = "";
  int line = 0;

  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
#define SIMT_WHERE ::simt::Where where = ::simt::Where::here()

inline bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
inline bool operator==(Where a, Where b) { return a.line == b.line && same_text(a.file, b.file); }
inline bool operator!=(Where a, Where b) { return !(a == b); }
inline std::string name(Where where) {
  const char* slash = std::strrchr(where.file, '/');
  return std::string(slash ? slash + 1 : where.file) + ":" + std::to_string(where.line);
}

// When asynchronous work is done.
enum class Policy { late, random, early };

// A copy of 16 bytes by cp.async, not yet done.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;  // read; the others of the 16 become zero
  int64_t group;  // groups this thread had ended before it
};

struct Block;
struct Thread;

constexpr unsigned kWarp = 32, kWarpgroup = 128;

// An operation that some threads of the group have come to and others not yet.
struct Meeting {
  unsigned first, size;  // the group: threads first .. first + size - 1 of the block
  uint32_t mask;  // of the lanes that take part, for a warp
  const char* what;
  Where where;
  unsigned expected, arrived;
  void* operands[kWarpgroup];  // on the threads' stacks
  Thread* members[kWarpgroup];

  bool holds(unsigned rank) const {
    return rank - first < size && (size != kWarp || mask >> (rank - first) & 1);
  }
};

// A hardware barrier of a block. `threads` end a phase, as the first of them said; 0 between phases.
struct Barrier {
  unsigned threads = 0, arrived = 0;
  Where where;  // of the first
  uint64_t phase = 1;
  std::vector<Thread*> waiting;
};

struct Thread {
  Block* block = nullptr;
  uint3 index{};
  unsigned rank = 0, lane = 0, warp = 0;  // rank = x + blockDim.x * (y + blockDim.y * z)
  bool exited = false;
  uint64_t arrived_in[16] = {};  // the last phase of each of the block's barriers
  const char* waits_for = nullptr;  // while it waits, and at which line
  Where where;
  bool (*ready)(const void*) = nullptr;  // of wait_until: whether the wait is over
  const void* ready_argument = nullptr;
  std::vector<Thread*>* waits_on = nullptr;  // the list it is in until changed()
  std::vector<AsyncCopy> copies;  // in the order of issue
  int64_t groups = 0;  // cp.async groups ended
  std::vector<std::function<void()>> at_exit;  // run on its fiber after the kernel's return
  std::shared_ptr<void> extension;  // sm90.h's
  Fiber fiber;
  char* stack = nullptr;
};

struct Cluster {
  std::vector<Block*> blocks;
  std::vector<Thread*> waiting;  // in cluster_sync
};

struct Block {
  char* shared = nullptr;
  int shared_bytes = 0;
  Cluster* cluster = nullptr;
  unsigned rank_in_cluster = 0;
  uint3 index{};
  std::vector<Thread*> threads;
  unsigned exited = 0;
  Barrier barriers[16];
  std::vector<Meeting*> meetings;  // open ones (warp.h)
  std::shared_ptr<void> extension;  // sm90.h's
  SharedMemory memory;
};

struct Work {
  std::function<void()> run;
  Thread* issuer;
};

struct Fault {};

struct Machine {
  // set by the test
  uint64_t seed = 0;
  int arch = 80, sm_count = 4, policy = -1;  // -1: drawn by the seed
  int mutant = 0;  // which fault is switched on in a kernel that test_simt.py has spoiled
  Ranges ranges;
  // of the launch
  const char* op = "";
  Policy when = Policy::late;
  unsigned drawn = 1;  // one in so many choices of a thread
  unsigned slow_drawn = 1;  // another warp becomes slow at one in so many
  uint64_t random_state = 1;
  uint64_t launches = 0;
  std::function<void()> body;
  std::string message;  // of the fault
  // of the clusters that run
  std::vector<Thread*> runnable;
  std::vector<Thread*> polling;  // their waits may be over
  const Thread* slow = nullptr;  // one of the slow warp's; null: no warp is slow
  unsigned slow_turns = 0;  // of its threads before the others are asked again whether they can run
  std::vector<Work> work;
  unsigned live = 0;
  Thread* running = nullptr;  // whose fiber's stack is in use; null on the scheduler's
  Fiber scheduler;
  // kept from launch to launch
  std::vector<std::unique_ptr<Meeting>> meetings;
  std::vector<Meeting*> spare_meetings;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Block>> blocks;
};

inline Machine machine;
inline Thread* current = nullptr;  // whom self() answers for; the running one but for others' work

inline Thread& self() { return *current; }

// --- chance

inline uint32_t random_bits() {  // xorshift64*
  uint64_t x = machine.random_state;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  machine.random_state = x;
  return uint32_t((x * 0x2545f4914f6cdd1dull) >> 32);
}
inline unsigned random_below(unsigned n) { return unsigned((uint64_t(random_bits()) * n) >> 32); }
inline bool one_in(unsigned n) { return random_below(n) == 0; }
template <class T>
void shuffle(std::vector<T>& v) {
  for (size_t i = v.size(); i-- > 1;) std::swap(v[i], v[random_below(unsigned(i + 1))]);
}
inline uint64_t random_pattern() { return uint64_t(random_bits()) << 32 | random_bits(); }

// --- faults

inline std::string name(const Thread& t) {
  char text[128];
  std::snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u)", t.block->index.x,
                t.block->index.y, t.block->index.z, t.index.x, t.index.y, t.index.z);
  return text;
}

// Ends the launch with that message.
[[noreturn]] inline void leave(const std::string& message) {
  machine.message = message;
  if (machine.running == nullptr) throw Fault{};
  Fiber& from = machine.running->fiber;
  machine.running = nullptr;
  switch_fiber(from, machine.scheduler, true);
  std::abort();
}

[[noreturn]] __attribute__((format(printf, 2, 3), cold)) inline void fault(Where where,
                                                                           const char* format,
                                                                           ...) {
  char text[320];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  leave(std::string(text) + " (" + (current ? name(*current) + ", " : "") + name(where) + ")");
}

// --- scheduling

// Where kernels read threadIdx and blockIdx: globals that every switch sets.
inline void resume(Thread& t) {
  machine.running = current = &t;
  ::threadIdx = t.index;
  ::blockIdx = t.block->index;
}

// Runs one piece of asynchronous work, any of those pending.
inline void run_some_work() {
  const size_t i = random_below(unsigned(machine.work.size()));
  Work work = std::move(machine.work[i]);
  machine.work.erase(machine.work.begin() + long(i));
  Thread* before = current;
  current = work.issuer;
  work.run();
  current = before;
}

// What these threads wait for has changed: they are to be asked. Asking all that wait, however little has
// changed, was nine tenths of the time of large clusters.
inline void changed(std::vector<Thread*>& waiting) {
  machine.polling.insert(machine.polling.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// Lets the polling thread at `i` run if its wait is over; else it waits for the next change.
inline bool poll(size_t i) {
  Thread* t = machine.polling[i];
  machine.polling[i] = machine.polling.back();
  machine.polling.pop_back();
  Thread* before = current;
  current = t;
  const bool over = t->ready(t->ready_argument);
  current = before;
  if (!over) t->waits_on->push_back(t);
  else machine.runnable.push_back(t), t->waits_on = nullptr;
  return over;
}

inline bool is_slow(const Thread& t) {
  return machine.slow != nullptr && t.warp == machine.slow->warp && t.block == machine.slow->block;
}

// Puts a thread that is not slow at the end of the runnable ones if any can run, if need be after a piece of
// asynchronous work: engines do not wait for a slow warp.
inline void pass_by_slow() {
  std::vector<Thread*>& runnable = machine.runnable;
  while (true) {
    for (size_t i = runnable.size(); i-- > 0;)
      if (!is_slow(*runnable[i])) return std::swap(runnable[i], runnable.back());
    bool woken = false;
    for (size_t i = machine.polling.size(); i-- > 0;)
      if (!is_slow(*machine.polling[i])) woken |= poll(i);
    if (woken) continue;
    if (machine.work.empty()) break;
    run_some_work();
  }
  machine.slow_turns = 64;  // asking them all takes its time
}

// The next thread to run; null where none can. Drawn, or the one that became runnable last: then a warp
// runs far ahead of the others, until it has to wait. Now and then waits end and work is done while other
// threads could still go on.
inline Thread* next_thread() {
  if (!machine.polling.empty() && one_in(16)) poll(random_below(unsigned(machine.polling.size())));
  if (!machine.work.empty() && machine.when == Policy::random && one_in(16)) run_some_work();
  std::vector<Thread*>& runnable = machine.runnable;
  if (runnable.empty()) return nullptr;
  if (one_in(machine.drawn))
    std::swap(runnable[random_below(unsigned(runnable.size()))], runnable.back());
  if (one_in(machine.slow_drawn))
    machine.slow = one_in(2) ? runnable[random_below(unsigned(runnable.size()))] : nullptr;
  if (machine.slow_turns > 0) --machine.slow_turns;
  else if (is_slow(*runnable.back())) pass_by_slow();
  Thread* t = runnable.back();
  runnable.pop_back();
  return t;
}

// Leaves the processor to someone else. Whoever wakes this thread puts it among the runnable ones.
inline void suspend(bool dying = false) {
  Thread& me = *machine.running;
  Thread* next = next_thread();
  if (next == &me) return;
  if (next != nullptr) {
    machine.running = next;
    switch_fiber(me.fiber, next->fiber, dying);
  } else {
    machine.running = nullptr;
    switch_fiber(me.fiber, machine.scheduler, dying);
  }
  resume(me);
}

// Waits until someone calls wake().
inline void wait(const char* what, Where where) {
  Thread& me = self();
  me.waits_for = what, me.where = where;
  suspend();
  me.waits_for = nullptr;
}
inline void wake(Thread* t) { machine.runnable.push_back(t); }

// Lets others run, now and then: in operations that order nothing.
inline void maybe_yield() {
  if (!one_in(16)) return;
  machine.runnable.push_back(machine.running);
  suspend();
}

// Waits until ready(), which the scheduler asks after changed(list()). `what` must outlive the wait.
template <class Ready, class List>
void wait_until(const Ready& ready, const List& list, const char* what, Where where) {
  if (one_in(4)) {  // the condition may hold and this thread come late all the same
    machine.runnable.push_back(machine.running);
    suspend();
  }
  if (ready()) return;
  Thread& me = self();
  me.ready = [](const void* p) { return bool((*static_cast<const Ready*>(p))()); };
  me.ready_argument = &ready;
  me.waits_on = &list();
  me.waits_on->push_back(&me);
  wait(what, where);
}

// Does work as the asynchronous engines do: at once, at any later moment, or when no thread can go on
// without it. What is left when the cluster's last thread exits is a fault: nobody waited for it.
inline void defer(std::function<void()> work) {
  if (machine.when == Policy::early || (machine.when == Policy::random && one_in(4))) return work();
  machine.work.push_back({std::move(work), current});
}

// --- memory

// Whether p lies in shared memory of the thread's cluster.
inline bool is_shared(const void* p) {
  for (const Block* b : self().block->cluster->blocks)
    if (p >= b->shared && p < b->shared + SharedMemory::kMost) return true;
  return false;
}

// Faults unless the bytes lie in shared memory of the thread's own block.
inline void check_shared(const void* p, size_t bytes, Where where) {
  const Block& b = *self().block;
  const char* c = static_cast<const char*>(p);
  if (c < b.shared || c + bytes > b.shared + b.shared_bytes)
    fault(where, "shared memory of %d bytes touched at offset %lld, %zu bytes", b.shared_bytes,
          (long long)(c - b.shared), bytes);
}

// Faults unless the bytes lie in one registered range, and in one that may be written if write.
inline void check_global(const void* p, size_t bytes, bool write, Where where) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  Range* r = machine.ranges.find(at, bytes);
  if (r == nullptr) {
    const Range* near = machine.ranges.nearest(at);
    if (is_shared(p)) fault(where, "global access to shared memory, %zu bytes", bytes);
    if (near == nullptr) fault(where, "global access of %zu bytes, none registered", bytes);
    fault(where, "%s of %zu bytes at offset %lld of a tensor of %lld bytes",
          write ? "store" : "load", bytes, (long long)(at - near->begin),
          (long long)(near->end - near->begin));
  }
  if (!write) return;
  if (!r->writable) fault(where, "store of %zu bytes to a tensor that is input", bytes);
  for (uintptr_t i = (at - r->begin) / 16; i <= (at + bytes - 1 - r->begin) / 16; ++i)
    r->written[i] = true;
}

// Faults if the running kernel has written any of the bytes, which the non-coherent cache may not see.
inline void check_constant(const void* p, size_t bytes, Where where) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const Range* r = machine.ranges.find(at, bytes);
  if (r == nullptr || !r->writable) return;
  for (uintptr_t i = (at - r->begin) / 16; i <= (at + bytes - 1 - r->begin) / 16; ++i)
    if (r->written[i]) fault(where, "constant load of what this kernel wrote");
}

inline void check_aligned(const void* p, size_t alignment, const char* what, Where where) {
  const size_t off = reinterpret_cast<uintptr_t>(p) % alignment;
  if (off != 0) fault(where, "%s %zu bytes off its alignment of %zu", what, off, alignment);
}

// The 32-bit address in shared memory: the offset from the block's base.
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - self().block->shared);
}
inline void* shared_pointer(Block& block, uint32_t address) { return block.shared + address; }

}  // namespace simt

// clang-format off
#include "simt/warp.h"
#include "simt/barrier.h"
#include "simt/launch.h"
// clang-format on
