// wgmma: products of a warpgroup that run beside its threads. A thread only notes down what it issues;
// the product is computed when a thread of the warpgroup waits for it, or as soon as all 128 threads have
// issued it. Operands come from the async view of shared memory at that moment. Until the wait the
// threads' own sums hold garbage.
#pragma once
#include <emmintrin.h>

#include "simt/tma.h"
#include "simt/wgmma_sparse.h"

namespace simt {

constexpr int kProductM = 64, kProductK = 32, kMostProductN = 256;

// --- descriptors

inline uint32_t row_address(const Tile& tile, uint32_t r) {
  return tile.address + r / 8 * tile.stride + r % 8 * tile.width;
}

// bits 0-13 address / 16, 16-29 leading offset (no meaning here), 32-45 stride / 16, 49-51 base offset,
// 62-63 swizzle: 1 = rows of `width` 128 bytes, 2 = of 64. `rows` rows of `bytes` bytes must lie in the block's
// shared memory.
inline Tile decoded(uint64_t descriptor, uint32_t rows, uint32_t bytes, uint32_t width,
                    Where where) {
  const Tile tile = {uint32_t(descriptor & 0x3fff) << 4, uint32_t(descriptor >> 32 & 0x3fff) << 4,
                     width};
  const Block& block = *self().block;
  const unsigned swizzle = unsigned(descriptor >> 62);
  if (swizzle != 128 / width)
    fault(where, "wgmma with swizzle mode %u: not modelled but for %u, %u bytes", swizzle,
          128 / width, width);
  if ((descriptor & ~0xc0003fff3fff3fffull) != 0)
    fault(where, "wgmma descriptor %016llx: base offset or reserved bits set",
          (unsigned long long)descriptor);
  if (tile.address % (8 * width) > width - bytes)
    fault(where, "wgmma operand at shared address %u: not modelled beyond the first %u of %u bytes",
          tile.address, width, 8 * width);
  // The swizzle stays within a row.
  const uint32_t end = row_address(tile, rows - 1) / width * width + width;
  if (end > uint32_t(block.shared_bytes))
    fault(where, "wgmma operand of %u rows at shared address %u ends at %u, beyond %d bytes", rows,
          tile.address, end, block.shared_bytes);
  return tile;
}

// --- the product

// The 32 bytes of row r, as int16.
inline void load_row(int16_t (&to)[kProductK], const char* view, const Tile& tile, uint32_t r) {
  for (uint32_t k = 0; k < kProductK; k += 16) {
    const uint32_t address = row_address(tile, r) + k;
    const char* from = view + swizzled(address, tile.width);
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    __m128i* out = reinterpret_cast<__m128i*>(to + k);
    _mm_storeu_si128(out, _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8));
    _mm_storeu_si128(out + 1, _mm_srai_epi16(_mm_unpackhi_epi8(x, x), 8));
  }
}

// matrix[64, n] += a[64, 32] b[n, 32]^T. b is turned to pairs of k, [16, n, 2], so that one multiply-add
// serves four columns.
inline void multiply(int32_t* matrix, int n, const char* view, const Tile& a, const Tile& b) {
  alignas(16) static int16_t rows[kProductK], pairs[kProductK / 2][kMostProductN][2];
  for (int j = 0; j < n; ++j) {
    load_row(rows, view, b, uint32_t(j));
    for (int k = 0; k < kProductK; ++k) pairs[k / 2][j][k % 2] = rows[k];
  }
  for (int i = 0; i < kProductM; ++i) {
    __m128i a_pair[kProductK / 2];
    load_row(rows, view, a, uint32_t(i));
    int32_t any = 0;
    for (int k = 0; k < kProductK / 2; ++k) {
      int32_t pair;
      std::memcpy(&pair, &rows[2 * k], 4);
      any |= pair;
      a_pair[k] = _mm_set1_epi32(pair);
    }
    if (any == 0) continue;  // rows beyond a small M
    for (int j = 0; j < n; j += 8) {
      __m128i* out = reinterpret_cast<__m128i*>(matrix + i * n + j);
      __m128i low = _mm_loadu_si128(out), high = _mm_loadu_si128(out + 1);
      for (int k = 0; k < kProductK / 2; ++k) {
        const __m128i* b_pairs = reinterpret_cast<const __m128i*>(&pairs[k][j]);
        low = _mm_add_epi32(low, _mm_madd_epi16(a_pair[k], _mm_load_si128(b_pairs)));
        high = _mm_add_epi32(high, _mm_madd_epi16(a_pair[k], _mm_load_si128(b_pairs + 1)));
      }
      _mm_storeu_si128(out, low);
      _mm_storeu_si128(out + 1, high);
    }
  }
}

// Computes the warpgroup's products with numbers below `limit`, in order.
inline void compute(Block& block, Warpgroup& group, int64_t limit) {
  for (; group.done < limit; ++group.done) {
    Product& p = group.products[size_t(group.done - group.first)];
    Sums& sums = *p.sums;
    if (!p.add) std::fill(sums.matrix.begin(), sums.matrix.end(), 0);
    const char* view = sm90(block).async_view.data();
    if (p.kind == ProductKind::dense_s8) multiply(sums.matrix.data(), sums.n, view, p.a, p.b);
    else multiply_sparse(sums.matrix.data(), sums.n, view, p);
  }
  while (!group.products.empty() && group.first < group.done &&
         group.products.front().issued == kWarpgroup)
    group.products.pop_front(), ++group.first;
}

// --- the threads' sums

// fn(sum of the thread's array, sum of the matrix) for all sums of thread t of the warpgroup.
template <class Fn>
void for_sums(Sums& sums, unsigned t, const Fn& fn) {
  const int row = int(16 * (t / 32) + t % 32 / 4), column = int(2 * (t % 4));
  SumWord* d = sums.array[t];
  for (int i = 0; i < sums.n / 8; ++i)
    for (int j = 0; j < 4; ++j)
      fn(d[4 * i + j], sums.matrix[size_t((row + 8 * (j / 2)) * sums.n + 8 * i + column + j % 2)]);
}

inline void check_untouched(Sums& sums, unsigned t, Where where) {
  for_sums(sums, t, [&](SumWord& own, int32_t&) {
    if (own != sums.garbage)
      fault(where, "sums written between a wgmma and the wgmma_wait that covers it");
  });
}

// The thread's array d, as sums of the product: those in flight already, or d's values moved aside.
inline void join_sums(Product& product, SumWord* d, int n, int64_t number, Where where) {
  const unsigned t = self().rank % kWarpgroup;
  std::vector<SumsInFlight>& in_flight = sm90(self()).sums;
  const auto mine = std::find_if(in_flight.begin(), in_flight.end(),
                                 [&](const SumsInFlight& s) { return s.sums->array[t] == d; });
  if (product.sums == nullptr && mine != in_flight.end()) product.sums = mine->sums;
  if (product.sums == nullptr) {
    product.sums = std::make_shared<Sums>();
    product.sums->n = n;
    product.sums->garbage = int32_t(random_bits());
    product.sums->matrix.resize(size_t(kProductM * n));
  }
  Sums& sums = *product.sums;
  if (sums.n != n) fault(where, "wgmma of another shape on sums in flight");
  if (mine != in_flight.end() ? mine->sums != product.sums : sums.array[t] != nullptr)
    fault(where, "divergent: the warpgroup's threads name different sums");
  if (mine != in_flight.end()) {
    check_untouched(sums, t, where);
    mine->last = number;
    return;
  }
  sums.array[t] = d;
  for_sums(sums, t, [&](SumWord& own, int32_t& aside) { aside = own, own = sums.garbage; });
  in_flight.push_back({product.sums, number});
}

inline Warpgroup& warpgroup(Where where) {
  std::vector<Warpgroup>& all = sm90(*self().block).warpgroups;
  const unsigned i = self().rank / kWarpgroup;
  if (i >= all.size()) fault(where, "thread %u is in no warpgroup of 128 threads", self().rank);
  return all[i];
}

inline void issue_product(SumWord* d, int n, uint64_t a, uint64_t b, bool add, Where where,
                          ProductKind kind = ProductKind::dense_s8, int select = 0,
                          uint32_t metadata = 0) {
  Sm90Thread& me = sm90(self());
  Warpgroup& group = warpgroup(where);
  me.product_at = where;
  if (!me.fenced) fault(where, "wgmma without wgmma_fence since the last wgmma_wait");
  const int64_t number = me.products++;
  const size_t i = size_t(number - group.first);
  if (i == group.products.size()) {
    const bool sparse = kind != ProductKind::dense_s8;
    const Tile a_tile = decoded(a, kProductM, kProductK, sparse ? 64 : 128, where);
    const Tile b_tile = decoded(b, uint32_t(n), sparse ? 2 * kProductK : kProductK, 128, where);
    group.products.push_back(
        {a, b, a_tile, b_tile, add, kind, select, where, nullptr, 0, done_early(), {}});
  }
  Product& p = group.products[i];
  if (p.where != where || p.a_descriptor != a || p.b_descriptor != b || p.add != add)
    fault(where, "divergent: wgmma with other operands than its warpgroup's at %s",
          name(p.where).c_str());
  p.metadata[self().rank % kWarpgroup] = metadata;
  join_sums(p, d, n, number, where);
  if (++p.issued == kWarpgroup) {
    if (p.early) compute(*self().block, group, number + 1);
    changed(group.waiting);
  }
  maybe_yield();
}

// Waits until the whole warpgroup has issued the products of all groups but the newest `pending`; then
// they are done, and sums that no younger product adds to come back to the thread.
inline void wait_products(size_t pending, Where where) {
  Sm90Thread& me = sm90(self());
  Warpgroup& group = warpgroup(where);
  me.fenced = false;
  const std::vector<int64_t>& ends = me.product_groups;
  const int64_t limit = ends.size() > pending ? ends[ends.size() - 1 - pending] : 0;
  const auto issued = [&] {
    return limit <= group.first ||
           group.products[size_t(limit - 1 - group.first)].issued == kWarpgroup;
  };
  const auto list = [&]() -> auto& { return group.waiting; };
  wait_until(issued, list, "wgmma_wait (for the warpgroup's other threads to issue the same)",
             where);
  compute(*self().block, group, limit);
  const unsigned t = self().rank % kWarpgroup;
  for (SumsInFlight& s : me.sums) {
    if (s.last >= limit) continue;
    check_untouched(*s.sums, t, where);
    for_sums(*s.sums, t, [](SumWord& own, int32_t& aside) { own = aside; });
    s.sums = nullptr;
  }
  me.sums.erase(std::remove_if(me.sums.begin(), me.sums.end(),
                               [](const SumsInFlight& s) { return s.sums == nullptr; }),
                me.sums.end());
}

inline void check_products_at_exit(const Sm90Thread& me) {
  if (!me.sums.empty()) fault(me.product_at, "wgmma without a wgmma_wait before its thread exits");
}

}  // namespace simt

namespace trimtab {
namespace {

// A warpgroup's register accesses are ordered anyway here; that it was not forgotten is checked.
TT_DEVICE void wgmma_fence() { simt::sm90(simt::self()).fenced = true; }

TT_DEVICE void wgmma_commit() {
  simt::Sm90Thread& me = simt::sm90(simt::self());
  me.product_groups.push_back(me.products);
}

template <int kPending>
TT_DEVICE void wgmma_wait(SIMT_WHERE) {
  static_assert(kPending >= 0 && kPending < 8, "groups");
  simt::wait_products(kPending, where);
}

template <int kCount>
TT_DEVICE void wgmma_pin(int32_t (&)[kCount]) {}
template <int kCount>
TT_DEVICE void wgmma_pin(float (&)[kCount]) {}

TT_DEVICE uint64_t wgmma_descriptor(const void* shared, SIMT_WHERE) {
  simt::check_shared(shared, 16, where);
  simt::check_aligned(shared, 16, "wgmma operand", where);
  const uint64_t address = (shared_address(shared) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

TT_DEVICE uint64_t wgmma_descriptor64(const void* shared, SIMT_WHERE) {
  simt::check_shared(shared, 16, where);
  simt::check_aligned(shared, 16, "wgmma operand", where);
  const uint64_t address = (shared_address(shared) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{512 >> 4} << 32 | uint64_t{2} << 62;
}

TT_DEVICE void wgmma_s8(int32_t (&d)[16], uint64_t a, uint64_t b, bool add, SIMT_WHERE) {
  simt::issue_product(d, 32, a, b, add, where);
}
TT_DEVICE void wgmma_s8(int32_t (&d)[32], uint64_t a, uint64_t b, bool add, SIMT_WHERE) {
  simt::issue_product(d, 64, a, b, add, where);
}
TT_DEVICE void wgmma_s8(int32_t (&d)[64], uint64_t a, uint64_t b, bool add, SIMT_WHERE) {
  simt::issue_product(d, 128, a, b, add, where);
}
TT_DEVICE void wgmma_s8(int32_t (&d)[96], uint64_t a, uint64_t b, bool add, SIMT_WHERE) {
  simt::issue_product(d, 192, a, b, add, where);
}
TT_DEVICE void wgmma_s8(int32_t (&d)[128], uint64_t a, uint64_t b, bool add, SIMT_WHERE) {
  simt::issue_product(d, 256, a, b, add, where);
}

template <int kSums>
TT_DEVICE void wgmma_sp_s8(int32_t (&d)[kSums], uint64_t a, uint64_t b, uint32_t e, bool add,
                           SIMT_WHERE) {
  simt::issue_product(d, 2 * kSums, a, b, add, where, simt::ProductKind::sparse_s8, 0, e);
}
template <int kSelect, int kSums>
TT_DEVICE void wgmma_sp_bf16(float (&d)[kSums], uint64_t a, uint64_t b, uint32_t e, bool add,
                             SIMT_WHERE) {
  simt::issue_product(reinterpret_cast<simt::SumWord*>(d), 2 * kSums, a, b, add, where,
                      simt::ProductKind::sparse_bf16, kSelect, e);
}
template <int kSelect, int kSums>
TT_DEVICE void wgmma_sp_fp16(float (&d)[kSums], uint64_t a, uint64_t b, uint32_t e, bool add,
                             SIMT_WHERE) {
  simt::issue_product(reinterpret_cast<simt::SumWord*>(d), 2 * kSums, a, b, add, where,
                      simt::ProductKind::sparse_fp16, kSelect, e);
}

}  // namespace
}  // namespace trimtab
