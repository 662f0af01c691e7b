// The copy engine: boxes of a tensor to shared memory and back, and the fence between its view of shared
// memory and the threads'.
//
// Two views of shared memory are kept. Threads write the one they see; the copy engine and wgmma read the
// other, async_view. fence_proxy_async brings the first to the second; what was not fenced is stale there.
// Loads go to both.
#pragma once
#include "simt/mbarrier.h"

namespace simt {

// Where a swizzle puts a byte: of 128 bytes, chunk of 16 (address bits 4-6) XOR row of 128 (bits 7-9); of 64, bits
// 4-5 XOR bits 7-8.
inline uint32_t swizzled(uint32_t address, int64_t width = 128) {
  return address ^ (address >> 3 & (width == 64 ? 0x30u : 0x70u));
}

// The part of a box's row that lies in the tensor: columns from .. to - 1 of the box; empty if from >= to.
struct Span {
  int64_t from, to;
  char* data;  // of column `from`
};
inline Span row_in_tensor(const TensorMap& map, int64_t x, int64_t y, int64_t row) {
  if (y + row < 0 || y + row >= map.rows) return {0, 0, nullptr};
  const int64_t from = std::max<int64_t>(0, -x);
  const int64_t to = std::min<int64_t>(map.box_bytes, map.columns - x);
  if (from >= to) return {0, 0, nullptr};
  return {from, to, map.data + (y + row) * map.stride + x + from};
}

// Faults unless the box's bytes in the tensor may be touched and its place in shared memory can hold it.
inline void check_box(const TensorMap& map, const void* shared, int x, int y, bool write,
                      Where where) {
  check_shared(shared, size_t(map.box_rows * map.box_bytes), where);
  check_aligned(shared, 1024, "box in shared memory", where);
  for (int64_t row = 0; row < map.box_rows; ++row) {
    const Span span = row_in_tensor(map, x, y, row);
    if (span.from < span.to) check_global(span.data, size_t(span.to - span.from), write, where);
  }
}

inline void write_both_views(Block& block, uint32_t address, const void* from, size_t bytes) {
  std::memcpy(shared_pointer(block, address), from, bytes);
  std::memcpy(&sm90(block).async_view[address], from, bytes);
}

// From the issue of a load to its end, its place holds garbage: the engine may write any part of it at
// any time.
inline void spoil(Block& block, uint32_t address, int64_t bytes) {
  const uint64_t garbage[2] = {random_pattern(), random_pattern()};
  for (int64_t i = 0; i < bytes; i += 16)
    write_both_views(block, address + uint32_t(i), garbage, 16);
}

inline void perform_load(Block& block, const TensorMap& map, uint32_t address, int x, int y,
                         uint32_t barrier, Where where) {
  check_fenced(block, barrier, where);
  for (int64_t row = 0; row < map.box_rows; ++row) {
    char bytes[kBoxBytes] = {};
    const Span span = row_in_tensor(map, x, y, row);
    if (span.from < span.to) std::memcpy(bytes + span.from, span.data, size_t(span.to - span.from));
    for (int chunk = 0; chunk < map.box_bytes; chunk += 16)
      write_both_views(block,
                       swizzled(address + uint32_t(row * map.box_bytes + chunk), map.box_bytes),
                       bytes + chunk, 16);
  }
  mbarrier_count(block, barrier, 0, 0, map.box_rows * map.box_bytes, where);
}

// The whole box to every block in the mask. Each part may come at another time.
inline void issue_load(void* shared, const CUtensorMap* packed_map, int x, int y, uint64_t* barrier,
                       unsigned mask, Where where) {
  maybe_yield();
  const TensorMap map = tensor_map(packed_map, where);
  check_box(map, shared, x, y, false, where);
  const uint32_t at = shared_address(shared), barrier_at = mbarrier_address(barrier, where);
  const auto& blocks = self().block->cluster->blocks;
  if (mask == 0 || mask >> blocks.size() != 0)
    fault(where, "load to blocks %#x of a cluster of %zu", mask, blocks.size());
  for (size_t rank = 0; rank < blocks.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    Block& block = *blocks[rank];
    check_fenced(block, barrier_at, where);
    spoil(block, at, map.box_rows * map.box_bytes);
    defer([=, &block] { perform_load(block, map, at, x, y, barrier_at, where); });
  }
}

// --- stores

// The store's reading half.
inline void read_box(BulkStore& store) {
  const std::vector<char>& view = sm90(*self().block).async_view;
  store.bytes.resize(size_t(store.map.box_rows) * kBoxBytes);
  for (uint32_t i = 0; i < store.bytes.size(); i += 16)
    std::memcpy(&store.bytes[i], &view[swizzled(store.shared + i)], 16);
}

inline void write_box(const BulkStore& store) {
  for (int64_t row = 0; row < store.map.box_rows; ++row) {
    const Span span = row_in_tensor(store.map, store.x, store.y, row);
    if (span.from < span.to)
      std::memcpy(span.data, &store.bytes[size_t(row * kBoxBytes + span.from)],
                  size_t(span.to - span.from));
  }
}

// No wait orders the writing half before the end of the kernel, so it is done when the thread exits. But
// shared memory is gone when the block is: the reading half must have been waited for.
inline void check_stores_at_exit(Sm90Thread& me) {
  for (BulkStore& store : me.stores) {
    if (store.group == me.store_groups)
      fault(store.where, "tma_store without tma_store_commit when its thread exits");
    if (store.group >= me.stores_read)
      fault(store.where, "tma_store without tma_store_wait_read when its thread exits");
    write_box(store);
  }
}

}  // namespace simt

namespace trimtab {
namespace {

TT_DEVICE void tensor_map_prefetch(const CUtensorMap* map, SIMT_WHERE) {
  simt::tensor_map(map, where);
}

TT_DEVICE void tma_load(void* shared, const CUtensorMap* map, int x, int y, uint64_t* barrier,
                        SIMT_WHERE) {
  const unsigned own = 1u << simt::self().block->rank_in_cluster;
  simt::issue_load(shared, map, x, y, barrier, own, where);
}

TT_DEVICE void tma_load_multicast(void* shared, const CUtensorMap* map, int x, int y,
                                  uint64_t* barrier, uint16_t blocks, SIMT_WHERE) {
  simt::issue_load(shared, map, x, y, barrier, blocks, where);
}

TT_DEVICE void tma_store(const CUtensorMap* map, const void* shared, int x, int y, SIMT_WHERE) {
  using namespace simt;
  maybe_yield();
  const TensorMap unpacked_map = tensor_map(map, where);
  if (unpacked_map.box_bytes != kBoxBytes) fault(where, "tma_store of 64-byte rows: not modelled");
  check_box(unpacked_map, shared, x, y, true, where);
  Sm90Thread& me = sm90(self());
  const uint32_t at = shared_address(shared);
  me.stores.push_back({unpacked_map, at, x, y, where, me.store_groups, {}});
  if (done_early()) read_box(me.stores.back());
}

TT_DEVICE void tma_store_commit() { ++simt::sm90(simt::self()).store_groups; }

template <int kPending>
TT_DEVICE void tma_store_wait_read() {
  using namespace simt;
  static_assert(kPending >= 0, "groups");
  maybe_yield();
  Sm90Thread& me = sm90(self());
  me.stores_read = std::max(me.stores_read, me.store_groups - kPending);
  for (BulkStore& store : me.stores)
    if (store.group < me.stores_read && store.bytes.empty()) read_box(store);
}

// All of the block's bytes, although it is this thread's writes alone that the fence is for.
TT_DEVICE void fence_proxy_async() {
  using namespace simt;
  Block& block = *self().block;
  std::vector<char>& view = sm90(block).async_view;
  std::memcpy(view.data(), block.shared, view.size());
}

}  // namespace
}  // namespace trimtab
