// From a launcher to the fibers.
#pragma once
#include "simt/core.h"

namespace simt {

// The most dynamic shared memory of a block: A100, the 8.6 and 8.9 parts, Hopper and data-centre Blackwell.
inline int shared_limit(int arch) {
  return arch >= 120 ? 99 * 1024 : arch >= 90 ? 227 * 1024 : arch > 80 ? 99 * 1024 : 163 * 1024;
}

constexpr unsigned kThreadsAtOnce = 1536;  // of clusters beside each other

// What a fiber runs. It never returns.
inline void thread_main() {
  entered(machine.scheduler);
  Thread& me = *machine.running;
  resume(me);
  machine.body();
  for (size_t i = 0; i < me.at_exit.size(); ++i) me.at_exit[i]();
  check_meetings_at_exit();
  check_barriers_at_exit();
  me.exited = true;
  ++me.block->exited;
  changed(me.block->cluster->waiting);
  --machine.live;
  suspend(true);
  std::abort();
}

inline void start_thread(Thread& t, Block& block, unsigned rank, unsigned color) {
  const dim3 size = blockDim;
  t.block = &block;
  t.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
  t.rank = rank, t.lane = rank % 32, t.warp = rank / 32;
  t.exited = false, t.waits_for = nullptr, t.ready = nullptr, t.waits_on = nullptr;
  std::fill(std::begin(t.arrived_in), std::end(t.arrived_in), 0);
  t.copies.clear(), t.groups = 0;
  t.at_exit.clear(), t.extension.reset();
  if (t.stack == nullptr) t.stack = new_stack();
  prepare_fiber(t.fiber, t.stack, color, random_pattern(), thread_main);
  block.threads.push_back(&t);
  machine.runnable.push_back(&t);
}

inline void start_block(Block& b, Cluster& cluster, unsigned rank, uint3 index, int shared_bytes) {
  b.shared = b.memory.start(size_t(shared_bytes), random_pattern());
  b.shared_bytes = shared_bytes;
  b.cluster = &cluster, b.rank_in_cluster = rank, b.index = index;
  for (Meeting* m : b.meetings) machine.spare_meetings.push_back(m);  // of a launch that faulted
  b.threads.clear(), b.meetings.clear(), b.exited = 0;
  for (Barrier& barrier : b.barriers) barrier = Barrier{};
  b.extension.reset();
  cluster.blocks.push_back(&b);
}

// Says who waits for what, a line of the kernel after the other.
inline std::string deadlock(unsigned threads) {
  std::string text = "deadlock:";
  std::vector<std::pair<Where, unsigned>> seen;
  for (unsigned i = 0; i < threads; ++i) {
    const Thread* t = machine.threads[i].get();
    if (t->exited) continue;
    const auto at =
        std::find_if(seen.begin(), seen.end(), [&](const auto& s) { return s.first == t->where; });
    if (at != seen.end()) {
      ++at->second;
      continue;
    }
    seen.push_back({t->where, 1});
    text += " " + name(*t) + " waits for " + t->waits_for + " at " + name(t->where) + ";";
  }
  for (const auto& [where, count] : seen)
    text += " " + std::to_string(count) + " at " + name(where);
  return text;
}

// Until the first `threads` of the machine's, those of `blocks` blocks, have exited.
inline void run_threads(unsigned threads, unsigned blocks) {
  while (true) {
    if (Thread* t = next_thread()) {
      machine.running = t;
      switch_fiber(machine.scheduler, t->fiber);
      if (!machine.message.empty()) throw Fault{};
      continue;
    }
    if (machine.live == 0) break;
    bool woken = false;
    for (size_t i = machine.polling.size(); i-- > 0;) woken |= poll(i);
    if (woken) continue;
    if (!machine.work.empty()) {
      run_some_work();
      continue;
    }
    // Nothing is left to change: what they wait for may have been written over.
    for (unsigned i = 0; i < threads; ++i)
      if (machine.threads[i]->waits_on != nullptr) changed(*machine.threads[i]->waits_on);
    for (size_t i = machine.polling.size(); i-- > 0;) woken |= poll(i);
    if (!woken) leave(deadlock(threads));
  }
  if (!machine.work.empty()) {
    current = machine.work.front().issuer;
    leave("asynchronous work that no one waited for when the block ended, issued by " +
          name(*current));
  }
  for (unsigned i = 0; i < blocks; ++i) {
    Block* b = machine.blocks[i].get();
    if (b->memory.overrun()) {
      current = b->threads.front();
      leave("shared memory written beyond its " + std::to_string(b->shared_bytes) + " bytes by " +
            name(*current));
    }
  }
}

// Some clusters of `size` blocks at the same time: numbers[i] is blocks numbers[i] * size .. + size - 1 along x
// of the grid.
inline void run_clusters(const std::vector<unsigned>& numbers, unsigned size, unsigned threads,
                         int shared_bytes) {
  std::vector<Cluster> clusters(numbers.size());
  const unsigned blocks = unsigned(numbers.size()) * size;
  machine.runnable.clear(), machine.polling.clear(), machine.work.clear();
  machine.live = blocks * threads;
  while (machine.blocks.size() < blocks) machine.blocks.push_back(std::make_unique<Block>());
  while (machine.threads.size() < machine.live)
    machine.threads.push_back(std::make_unique<Thread>());
  const unsigned across = gridDim.x / size;
  for (unsigned at = 0; at < blocks; ++at) {
    Block& block = *machine.blocks[at];
    const unsigned number = numbers[at / size], rank = at % size;
    const uint3 index = {number % across * size + rank, number / across % gridDim.y,
                         number / across / gridDim.y};
    start_block(block, clusters[at / size], rank, index, shared_bytes);
    for (unsigned i = 0; i < threads; ++i)
      start_thread(*machine.threads[at * threads + i], block, i, at * threads + i);
  }
  machine.slow = one_in(2) ? machine.runnable[random_below(machine.live)] : nullptr;
  shuffle(machine.runnable);
  run_threads(blocks * threads, blocks);
}

// What the driver would refuse.
inline const char* refusal(dim3 grid, dim3 block, int shared_bytes, int cluster) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64) return "1 to 1024 threads a block";
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffff) return "a grid of some blocks";
  if (grid.y > 65535 || grid.z > 65535) return "at most 65535 blocks along y and z";
  if (cluster < 1 || cluster > 8 || grid.x % unsigned(cluster) != 0)
    return "a cluster of 1 to 8 blocks that divides the grid";
  if (cluster > 1 && machine.arch < 90) return "clusters on sm_90 and later only";
  if (shared_bytes < 0 || shared_bytes > shared_limit(machine.arch))
    return "shared memory within the device's limit";
  return nullptr;
}

// Runs body, which calls the kernel, in every thread of the grid.
template <class Shape, class Body>
tt_status launch(const char* op, const Shape& shape, tt_stream /*stream*/, const Body& body) {
  const unsigned size = unsigned(shape.cluster);
  if (const char* why = refusal(shape.grid, shape.block, shape.shared_bytes, shape.cluster))
    return trimtab::set_error(TT_CUDA_ERROR,
                              "%s: launching its kernel failed: expected %s, got grid (%u, %u, "
                              "%u), block (%u, %u, %u), cluster %d, %d bytes",
                              op, why, shape.grid.x, shape.grid.y, shape.grid.z, shape.block.x,
                              shape.block.y, shape.block.z, shape.cluster, shape.shared_bytes);
  const unsigned control = _mm_getcsr();
  _mm_setcsr(0x1f80);  // nearest even, subnormals kept, whatever the caller's thread has set
  machine.random_state = (machine.seed * 0x9e3779b97f4a7c15ull + ++machine.launches) | 1;
  for (int i = 0; i < 8; ++i) random_bits();
  machine.when = Policy(machine.policy >= 0 ? unsigned(machine.policy) : random_below(3));
  machine.drawn = 1u << 3 * random_below(3);
  machine.slow_drawn = 256u << 3 * random_below(3);
  machine.op = op;
  machine.body = body;
  machine.message.clear();
  machine.scheduler = Fiber{};
  machine.running = current = nullptr;
  machine.ranges.start_kernel();
  gridDim = shape.grid, blockDim = shape.block;

  std::vector<unsigned> order(gridDim.x / size * gridDim.y * gridDim.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  shuffle(order);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  tt_status status = TT_OK;
  try {
    for (size_t first = 0; first < order.size();) {
      const size_t most =
          std::max(1u, std::min(1 + random_below(3), kThreadsAtOnce / (size * threads)));
      const size_t end = std::min(first + most, order.size());
      run_clusters({order.begin() + long(first), order.begin() + long(end)}, size, threads,
                   shape.shared_bytes);
      first = end;
    }
  } catch (const Fault&) {
    status = trimtab::set_error(TT_CUDA_ERROR, "%s: %s", op, machine.message.c_str());
  }
  machine.body = nullptr;
  machine.running = current = nullptr;
  _mm_setcsr(control);
  return status;
}

}  // namespace simt
