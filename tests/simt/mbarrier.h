// mbarriers: a 64-bit word in shared memory that holds the whole state, so that a word no one initialised
// and one that was written over are noticed. Beside it stands a copy for comparison.
#pragma once
#include "simt/sm90_state.h"

namespace simt {

// The running phase. It ends when no arrival and no byte is missing; bytes may come before they are
// expected (from another block's multicast), so `bytes` is below 0 at times.
struct Phase {
  int count;  // arrivals of a phase
  int pending;  // still to come
  int parity;
  int bytes;  // expected and not come
};

// bits 0-14 count, 15-29 pending, 30 parity, 31-52 bytes + 2^21, 53-63 a mark
constexpr int kMostArrivals = (1 << 15) - 1;
constexpr int kMostBytes = (1 << 20) - 1;  // the hardware's range of the byte count, both ways
constexpr uint64_t kMbarrierMark = uint64_t{0x5a7} << 53;

inline uint64_t packed(const Phase& p) {
  return kMbarrierMark | uint64_t(p.bytes + (1 << 21)) << 31 | uint64_t(p.parity) << 30 |
         uint64_t(p.pending) << 15 | uint64_t(p.count);
}
inline Phase unpacked(uint64_t word) {
  return {int(word & 0x7fff), int(word >> 15 & 0x7fff), int(word >> 30 & 1),
          int(word >> 31 & 0x3fffff) - (1 << 21)};
}

inline uint64_t& mbarrier_word(Block& block, uint32_t address) {
  return *static_cast<uint64_t*>(shared_pointer(block, address));
}

// The barrier at an address, or a fault if there is none or something else was stored there.
inline Mbarrier& mbarrier_at(Block& block, uint32_t address, Where where) {
  if (block.exited == block.threads.size())
    fault(where, "mbarrier of block rank %u of the cluster used after that block has exited",
          block.rank_in_cluster);
  auto& all = sm90(block).mbarriers;
  const auto found = all.find(address);
  if (found == all.end())
    fault(where, "mbarrier at shared address %u is not initialised (block rank %u)", address,
          block.rank_in_cluster);
  if (mbarrier_word(block, address) != found->second.word)
    fault(where, "mbarrier at shared address %u was written over (block rank %u)", address,
          block.rank_in_cluster);
  return found->second;
}

// For uses by the copy engine and from other blocks: mbarrier_init must have been fenced.
inline void check_fenced(Block& block, uint32_t address, Where where) {
  if (mbarrier_at(block, address, where).unfenced != nullptr)
    fault(where, "mbarrier at shared address %u used without fence_mbarrier_init", address);
}

// Arrivals, bytes expected and bytes that have come; ends the phase if that was the last of it.
inline void mbarrier_count(Block& block, uint32_t address, int arrivals, int64_t expected,
                           int64_t come, Where where, bool release = false) {
  Mbarrier& m = mbarrier_at(block, address, where);
  Phase p = unpacked(m.word);
  const int64_t bytes = p.bytes + expected - come;
  if (bytes > kMostBytes || bytes < -kMostBytes)
    fault(where, "mbarrier at shared address %u: %lld bytes expected", address, (long long)bytes);
  if (arrivals > p.pending)
    fault(where, "mbarrier at shared address %u: more arrivals in a phase than its count of %d",
          address, p.count);
  p.bytes = int(bytes), p.pending -= arrivals;
  if (p.pending == 0 && p.bytes < 0)
    fault(where, "mbarrier at shared address %u: %d bytes more came than were expected", address,
          -p.bytes);
  m.released = m.released && (release || arrivals == 0);
  if (p.pending == 0 && p.bytes == 0) {
    p.parity ^= 1, p.pending = p.count;
    m.acquirable = m.released, m.released = true;
    changed(m.waiting);
  }
  m.word = mbarrier_word(block, address) = packed(p);
}

// The address of a thread's own barrier; faults if it is none in shared memory.
inline uint32_t mbarrier_address(const uint64_t* barrier, Where where) {
  check_shared(barrier, sizeof *barrier, where);
  check_aligned(barrier, sizeof *barrier, "mbarrier", where);
  sm90(self());
  return shared_address(barrier);
}

// At the barrier of the same address in block `rank`. What this thread may load from other blocks then
// belongs to the exchange before; the next one needs its own wait.
inline void mbarrier_arrive_at(uint64_t* barrier, uint32_t rank, bool release, Where where) {
  maybe_yield();
  const uint32_t address = mbarrier_address(barrier, where);
  const auto& blocks = self().block->cluster->blocks;
  if (rank >= blocks.size())
    fault(where, "arrival at block rank %u of a cluster of %zu", rank, blocks.size());
  check_fenced(*blocks[rank], address, where);
  if (release) sm90(self()).acquired = false;
  mbarrier_count(*blocks[rank], address, 1, 0, 0, where, release);
}

inline void mbarrier_wait_for(uint64_t* barrier, uint32_t parity, Where where) {
  const uint32_t address = mbarrier_address(barrier, where);
  Block& block = *self().block;
  if (parity > 1) fault(where, "mbarrier_wait for parity %u", parity);
  char what[64];
  std::snprintf(what, sizeof what, "mbarrier_wait(shared address %u, parity %u)", address, parity);
  const auto barrier_now = [&]() -> Mbarrier& { return mbarrier_at(block, address, where); };
  const auto over = [&] { return unpacked(barrier_now().word).parity != int(parity); };
  const auto list = [&]() -> auto& { return barrier_now().waiting; };
  wait_until(over, list, what, where);
  fall_behind(256, where);
}

// When the last thread of the block exits, no byte may be missing.
inline void check_mbarriers_at_exit(Block& block) {
  for (const auto& [address, m] : sm90(block).mbarriers) {
    const Phase p = unpacked(m.word);
    if (p.bytes != 0)
      fault(m.where, "mbarrier at shared address %u: %d bytes %s at the end of the block", address,
            std::abs(p.bytes), p.bytes > 0 ? "are missing" : "too many came");
  }
}

}  // namespace simt

namespace trimtab {
namespace {

TT_DEVICE void mbarrier_init(uint64_t* barrier, int count, SIMT_WHERE) {
  using namespace simt;
  fall_behind(4, where);  // whoever does not wait for the initialisation comes before it
  const uint32_t address = mbarrier_address(barrier, where);
  if (count < 1 || count > kMostArrivals) fault(where, "mbarrier_init with a count of %d", count);
  Block& block = *self().block;
  if (sm90(block).mbarriers.count(address) != 0)
    fault(where, "mbarrier_init of a barrier in use, at shared address %u", address);
  const uint64_t word = packed({count, count, 0, 0});
  sm90(block).mbarriers[address] = {word, &self(), where, true, false};
  mbarrier_word(block, address) = word;
  maybe_yield();
}

TT_DEVICE void fence_mbarrier_init() {
  using namespace simt;
  for (auto& [address, m] : sm90(*self().block).mbarriers)
    if (m.unfenced == &self()) m.unfenced = nullptr;
}

TT_DEVICE void mbarrier_arrive(uint64_t* barrier, SIMT_WHERE) {
  using namespace simt;
  maybe_yield();
  mbarrier_count(*self().block, mbarrier_address(barrier, where), 1, 0, 0, where);
}

TT_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank, SIMT_WHERE) {
  simt::mbarrier_arrive_at(barrier, rank, false, where);
}

TT_DEVICE void mbarrier_release_cluster(uint64_t* barrier, uint32_t rank, SIMT_WHERE) {
  simt::mbarrier_arrive_at(barrier, rank, true, where);
}

TT_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, SIMT_WHERE) {
  using namespace simt;
  maybe_yield();
  mbarrier_count(*self().block, mbarrier_address(barrier, where), 1, bytes, 0, where);
}

TT_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity, SIMT_WHERE) {
  simt::mbarrier_wait_for(barrier, parity, where);
}

TT_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity, SIMT_WHERE) {
  simt::mbarrier_wait_for(barrier, parity, where);
  simt::Block& block = *simt::self().block;
  const uint32_t address = shared_address(barrier);
  if (simt::mbarrier_at(block, address, where).acquirable) simt::sm90(simt::self()).acquired = true;
}

}  // namespace
}  // namespace trimtab
