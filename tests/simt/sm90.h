// The wrappers of csrc/cuda/ptx_sm90.cuh on the SIMT machine. What each header holds against a
// kernel:
//
//   mbarrier.h  words not initialised, not fenced, written over; arrivals and bytes beyond what is expected
//   tma.h       loads land at the last moment, and their place is garbage from the issue on; stores read at
//               the wait; both see shared memory as of the last fence_proxy_async
//   wgmma.h     operands are read at the wait, sums are garbage until then; descriptors are decoded
//   here        clusters, and registers that a warpgroup may take
#pragma once
#include "simt/mbarrier.h"
#include "simt/tma.h"
#include "simt/wgmma.h"

namespace simt {

// Of every thread of a block that used anything of sm_90.
inline void check_sm90_at_exit() {
  Thread& me = self();
  if (me.extension != nullptr) {
    check_products_at_exit(sm90(me));
    check_stores_at_exit(sm90(me));
  }
  if (me.block->exited + 1 == me.block->threads.size()) check_mbarriers_at_exit(*me.block);
}

// --- clusters

// The cluster's threads that have not exited.
inline size_t cluster_threads(const Cluster& cluster) {
  size_t n = 0;
  for (const Block* b : cluster.blocks) n += b->threads.size() - b->exited;
  return n;
}

// A barrier of those threads. A warp's come to it together, from one line, as .aligned demands.
inline void join_cluster_barrier(Where where) {
  int nothing = 0;
  meet_warp(~0u, nothing, [](const auto&) {}, "cluster_sync", where);
  Cluster& cluster = *self().block->cluster;
  Sm90Block& keeper = sm90(*cluster.blocks[0]);
  if (++keeper.cluster_arrived >= cluster_threads(cluster)) changed(cluster.waiting);
  const uint64_t phase = keeper.cluster_phase;
  const auto over = [&] {
    if (phase == keeper.cluster_phase && keeper.cluster_arrived >= cluster_threads(cluster)) {
      keeper.cluster_arrived = 0;
      ++keeper.cluster_phase;
      changed(cluster.waiting);
    }
    return phase != keeper.cluster_phase;
  };
  const auto list = [&]() -> auto& { return cluster.waiting; };
  wait_until(over, list, "cluster_sync", where);
  sm90(self()).acquired = true;
}

// Other blocks' writes are seen after cluster_sync, or after mbarrier_wait_cluster for a phase to which all
// arrivals were mbarrier_release_cluster.
inline uint32_t load_remote(const uint32_t* shared, uint32_t rank, Where where) {
  check_shared(shared, sizeof *shared, where);
  check_aligned(shared, sizeof *shared, "load_shared_cluster", where);
  const std::vector<Block*>& blocks = self().block->cluster->blocks;
  if (rank >= blocks.size())
    fault(where, "load from block rank %u of a cluster of %zu", rank, blocks.size());
  Block& block = *blocks[rank];
  if (block.exited == block.threads.size())
    fault(where, "load from block rank %u, which has exited", rank);
  if (&block != self().block && !sm90(self()).acquired)
    fault(where, "load from block rank %u without a release and mbarrier_wait_cluster before it",
          rank);
  maybe_yield();
  uint32_t word;
  std::memcpy(&word, shared_pointer(block, shared_address(shared)), sizeof word);
  return word;
}

// --- registers

constexpr int kRegisters = 64 * 1024;  // of a multiprocessor

// What a warpgroup had at launch is the compiler's choice and not known here, so only what it has asked
// for counts.
inline void set_registers(int count, bool more, const char* what, Where where) {
  Warpgroup& group = warpgroup(where);
  const auto change = [&](const auto&) {
    if (count % 8 != 0 || count < 24 || count > 256)
      fault(where, "%s to %d registers: expected a multiple of 8 in 24 to 256", what, count);
    if (group.registers != 0 && (more ? count < group.registers : count > group.registers))
      fault(where, "%s from %d to %d registers", what, group.registers, count);
    group.registers = count;
    int all = 0;
    for (const Warpgroup& g : sm90(*self().block).warpgroups) all += int(kWarpgroup) * g.registers;
    if (all > kRegisters)
      fault(where, "%s to %d registers: the warpgroups ask for %d of %d", what, count, all,
            kRegisters);
  };
  int nothing = 0;
  meet_warpgroup(nothing, change, what, where);
}

}  // namespace simt

namespace trimtab {
namespace {

TT_DEVICE uint32_t cluster_rank() { return simt::self().block->rank_in_cluster; }

TT_DEVICE uint32_t load_shared_cluster(const uint32_t* shared, uint32_t rank, SIMT_WHERE) {
  return simt::load_remote(shared, rank, where);
}

TT_DEVICE void cluster_sync(SIMT_WHERE) { simt::join_cluster_barrier(where); }

template <int kCount>
TT_DEVICE void setmaxnreg_dec(SIMT_WHERE) {
  simt::set_registers(kCount, false, "setmaxnreg.dec", where);
}
template <int kCount>
TT_DEVICE void setmaxnreg_inc(SIMT_WHERE) {
  simt::set_registers(kCount, true, "setmaxnreg.inc", where);
}

}  // namespace
}  // namespace trimtab
