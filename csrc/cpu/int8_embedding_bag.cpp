// int8_embedding_bag: bags over threads; a bag's sum runs over its indices in order.
#include <trimtab/int8_embedding_bag.h>

#include <algorithm>

#include "cpu/int8_embedding.h"
#include "cpu/int8_product.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/status.h"

namespace trimtab {
namespace {

constexpr const char* kOp = "int8_embedding_bag";
// Columns summed at once: 4 KiB of fp32 beside the rows that stream through L1.
constexpr int64_t kColumns = 1024;

tt_status check_bags(const tt_bags& b) {
  if (b.bags < 0 || (b.mode != TT_BAG_SUM && b.mode != TT_BAG_MEAN)) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected bags >= 0 and mode 0 (sum) or 1 (mean)",
                     kOp);
  }
  if (b.per_sample_weight != nullptr && b.mode != TT_BAG_SUM) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected per_sample_weights with mode sum only",
                     kOp);
  }
  if (b.offsets == nullptr) {
    if (b.bags > 0 ? b.count % b.bags == 0 : b.count == 0) return TT_OK;
    return set_error(TT_INVALID_ARGUMENT, "%s: expected bags of equal size without offsets", kOp);
  }
  if (b.offset_count != b.bags && b.offset_count != b.bags + 1) {
    return set_error(TT_INVALID_ARGUMENT, "%s: expected %lld offsets or one more, got %lld", kOp,
                     (long long)b.bags, (long long)b.offset_count);
  }
  int64_t before = 0;
  for (int64_t i = 0; i < b.offset_count; ++i) {
    const int64_t at = index_at(b.offsets, b.index_size, i);
    if ((i == 0 && at != 0) || at < before || at > b.count) {
      return set_error(
          TT_INVALID_ARGUMENT,
          "%s: expected offsets that begin at 0, never fall and stay <= %lld, the number "
          "of indices, got %lld at position %lld",
          kOp, (long long)b.count, (long long)at, (long long)i);
    }
    before = at;
  }
  return TT_OK;
}

int64_t bag_begin(const tt_bags& b, int64_t bag) {
  if (b.offsets == nullptr) return b.count / b.bags * bag;
  return bag < b.offset_count ? index_at(b.offsets, b.index_size, bag) : b.count;
}

void one_bag(const tt_int8_table& table, const tt_bags& b, const EmbeddingLanes& lanes, int64_t bag,
             char* out, tt_dtype out_dtype) {
  const int64_t begin = bag_begin(b, bag), end = bag_begin(b, bag + 1), D = table.columns;
  alignas(64) float acc[kColumns];
  for (int64_t d = 0; d < D; d += kColumns) {
    const int64_t columns = std::min(kColumns, D - d);
    std::fill(acc, acc + columns, 0.0f);
    int64_t added = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = index_at(b.indices, b.index_size, i);
      if (index == b.padding_index) continue;
      const float weight = b.per_sample_weight != nullptr ? b.per_sample_weight[i] : 1.0f;
      lanes.add(table.weight + index * D + d, table.scale[index], weight, columns, acc);
      ++added;
    }
    const float divisor = b.mode == TT_BAG_MEAN && added > 0 ? float(added) : 1.0f;
    lanes.finish(acc, divisor, columns, out + d * dtype_size(out_dtype), out_dtype);
  }
}

}  // namespace
}  // namespace trimtab

using namespace trimtab;

tt_status tt_int8_embedding_bag(const tt_int8_table* table, const tt_bags* bags, void* out,
                                tt_dtype out_dtype, const tt_parallel* parallel) {
  if (bags == nullptr) return set_error(TT_INVALID_ARGUMENT, "%s: bags is NULL", kOp);
  tt_status status =
      check_embedding(kOp, table, bags->indices, bags->index_size, bags->count, out_dtype);
  if (status == TT_OK) status = check_bags(*bags);
  tt_isa isa;
  if (status == TT_OK) status = current_isa(&isa);
  if (status != TT_OK) return status;
  const int64_t D = table->columns;
  if (bags->bags > 0 && D > 0 && out == nullptr) {
    return set_error(TT_INVALID_ARGUMENT, "%s: out is NULL", kOp);
  }
  const EmbeddingLanes& lanes = embedding_lanes(isa);
  const int64_t row_bytes = D * dtype_size(out_dtype);
  // A task is about 32 K added elements.
  const int64_t bag_work =
      std::max<int64_t>(D * (bags->count / std::max<int64_t>(bags->bags, 1)), 1);
  const int64_t step = std::max<int64_t>(32768 / bag_work, 1);
  const tt_parallel pool = pool_or_serial(parallel);
  parallel_run(pool, (bags->bags + step - 1) / step, [&](int64_t task) {
    const int64_t end = std::min((task + 1) * step, bags->bags);
    for (int64_t bag = task * step; bag < end; ++bag)
      one_bag(*table, *bags, lanes, bag, static_cast<char*>(out) + bag * row_bytes, out_dtype);
  });
  return TT_OK;
}
