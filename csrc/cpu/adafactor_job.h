// adafactor's call with its working memory, and its passes.
#pragma once
#include <trimtab/adafactor.h>

#include "cpu/adafactor_kernels.h"
#include "cpu/optim_job.h"
#include "math/norm.h"

namespace trimtab {

// Of the passes that take elements as they lie in memory.
constexpr int64_t kFlatTile = 65536;
// One tensor and its share of the working memory.
struct Item {
  int64_t index;  // of the tensor
  int64_t numel;
  int64_t batch, rows, columns;  // as in tt_adafactor_shape
  int64_t row_tiles, column_tiles;
  double* sums;  // as tt_adafactor_call::sums
  float *row_factor, *column_factor;  // [batch * rows], [batch * columns]
  double* block_squares;  // [blocks()][2]
  double* row_parts;  // [column_tiles][batch * rows]
  float* column_parts;  // [row_tiles][batch * columns]
  double step;
  float sign;
  AdafactorConstants constants;

  bool is_matrix() const { return batch > 0; }
  int64_t tiles() const { return batch * row_tiles * column_tiles; }
  int64_t flat_tiles() const { return (numel + kFlatTile - 1) / kFlatTile; }
  int64_t blocks() const { return (numel + kNormBlock - 1) / kNormBlock; }
  AdafactorFactors factors() const { return {row_factor, column_factor, rows, columns}; }
  double* means() const { return sums + 2; }
  double* row_sums() const { return sums + 2 + batch; }
  double* column_sums() const { return row_sums() + batch * rows; }
};

struct Adafactor {
  const tt_adafactor_call& call;
  OptimJob job;
  AdafactorKernels kernels;
  Item* items;  // those with a gradient, the small ones first
  int64_t count, small;
  int64_t* offset;  // [count + 1] of each item's first element among all

  const tt_optim_tensor& tensor(const Item& item) const { return job.call.tensors[item.index]; }
  const tt_adafactor_group& group(const Item& item) const {
    return call.groups[tensor(item).group];
  }
};

// A tile of the tensor at a time (adafactor_passes.cpp).
struct TilePass {
  int64_t (Item::*tiles)() const;
  void (*run)(const Adafactor&, const Item&, int64_t tile);
};
extern const TilePass kSquares, kDirection, kUpdate;

// Between the passes, of the whole tensor.
void add_squares(const Item& item);  // of all tiles, into sums
void average(const Adafactor& a, const Item& item,
             bool moves);  // states into factors; moves: new ones
void make_factors(const Adafactor& a, const Item& item);  // after average
void add_directions(const Item& item);
void set_rate(const Adafactor& a, Item& item);

}  // namespace trimtab
