// trimtab._numpy: products with sparse weights. As in module.cpp, the checks are here and the
// documentation is in trimtab/numpy/__init__.py.
#include <trimtab/bitmap_linear.h>
#include <trimtab/block_linear.h>

#include <algorithm>
#include <cstring>

#include "array.h"

namespace trimtab {
namespace {

[[noreturn]] void refuse(const char* op, const std::string& expected) {
  throw py::value_error(std::string(op) + ": expected " + expected);
}

// A 1-D array of `dtype` and, unless it is negative, `count` elements; adjacent.
py::array take_vector(const char* op, const char* name, py::handle object, Dtype dtype,
                      int64_t count) {
  const Array array(op, name, object);
  array.expect_dtype(dtype);
  array.expect_rank(1);
  if (count >= 0 && array.size(0) != count) {
    refuse(op, std::string(name) + " [" + number(count) + "], got " + array.describe());
  }
  return adjacent(array.memory);
}

// The values of a sparse weight: of x's dtype, or int8 with a scale.
struct Values {
  py::array memory;
  tt_dtype dtype;
  Values(const char* op, const Array& array, const Array& x, tt_dtype x_dtype, bool scaled)
      : dtype(TT_I8) {
    if (array.dtype != Dtype::kInt8) {
      dtype = array.expect_float();
      if (dtype != x_dtype) {
        throw py::type_error(std::string(op) + ": expected values of int8 or of x's dtype for x " +
                             x.describe() + ", got " + array.describe());
      }
    }
    if (scaled != (dtype == TT_I8)) {
      throw py::type_error(std::string(op) + ": expected weight_scale with int8 values and with " +
                           "those alone, got " + (scaled ? "one" : "none") + " for " +
                           array.describe());
    }
    memory = adjacent(array.memory);
  }
};

Scale take_scale(const char* op, py::handle weight_scale, int64_t N) {
  if (weight_scale.is_none()) return Scale(N);
  Scale scale(op, "weight_scale", weight_scale);
  if (scale.N != N) {
    refuse(op, "weight_scale [N=" + number(N) + "], got [" + number(scale.N) + "]");
  }
  return scale;
}

int64_t count_bits(const uint8_t* bytes, int64_t words) {
  int64_t count = 0;
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, bytes + 8 * i, sizeof word);
    count += __builtin_popcountll(word);
  }
  return count;
}

// row_start [N + 1] from the bits; refuses bits past K and another number of bits than of values.
py::array count_rows(const char* op, const py::array& bitmap, int64_t N, int64_t K, int64_t kept) {
  const auto* bits = static_cast<const uint8_t*>(bitmap.data());
  const int64_t row_bytes = tt_bitmap_row_bytes(K);
  py::array row_start(py::dtype::of<int64_t>(), std::vector<py::ssize_t>{N + 1});
  auto* start = static_cast<int64_t*>(row_start.mutable_data());
  start[0] = 0;
  for (int64_t n = 0; n < N; ++n) {
    const uint8_t* row = bits + n * row_bytes;
    start[n + 1] = start[n] + count_bits(row, row_bytes / 8);
    for (int64_t k = K; k < 8 * row_bytes; ++k) {
      if (row[k / 8] >> (k % 8) & 1) {
        refuse(op, "no bit past K=" + number(K) + ", found one in row " + number(n));
      }
    }
  }
  if (start[N] != kept) {
    refuse(op, "as many values as bits that are set, got " + number(kept) + " values and " +
                   number(start[N]) + " bits");
  }
  return row_start;
}

py::array bitmap_row_start(py::handle values, py::handle bitmap, int64_t K) {
  constexpr const char* op = "bitmap_row_start";
  const Array kept(op, "values", values), bits(op, "bitmap", bitmap);
  kept.expect_rank(1);
  bits.expect_dtype(Dtype::kUint8);
  bits.expect_rank(2);
  if (K < 0 || bits.size(1) != tt_bitmap_row_bytes(K)) {
    refuse(op, "bitmap [N, " + number(tt_bitmap_row_bytes(std::max<int64_t>(K, 0))) +
                   "] for K=" + number(K) + ", got " + bits.describe());
  }
  return count_rows(op, adjacent(bits.memory), bits.size(0), K, kept.size(0));
}

py::object bitmap_linear(py::handle x, py::handle values, py::handle bitmap, py::handle row_start,
                         py::handle weight_scale, py::handle bias, const std::string& activation,
                         py::handle out_dtype, py::handle out) {
  constexpr const char* op = "bitmap_linear";
  const Array array(op, "x", x), kept(op, "values", values), bits(op, "bitmap", bitmap);
  const tt_dtype dtype = array.expect_float();
  const Rows rows(array);
  kept.expect_rank(1);
  const Values held(op, kept, array, dtype, !weight_scale.is_none());
  bits.expect_dtype(Dtype::kUint8);
  bits.expect_rank(2);
  const int64_t N = bits.size(0);
  if (bits.size(1) != tt_bitmap_row_bytes(rows.K)) {
    refuse(op, "bitmap [N, " + number(tt_bitmap_row_bytes(rows.K)) + "] for K=" + number(rows.K) +
                   ", got " + bits.describe());
  }
  const py::array mask = adjacent(bits.memory);
  const py::array start = row_start.is_none()
                              ? count_rows(op, mask, N, rows.K, kept.size(0))
                              : take_vector(op, "row_start", row_start, Dtype::kInt64, N + 1);
  const Scale scale = take_scale(op, weight_scale, N);
  const Epilogue epilogue(op, scale, bias, activation, out_dtype, out, dtype,
                          shape_with_last(array, N));
  epilogue.expect_no_alias("x", rows.memory);
  epilogue.expect_no_alias("values", held.memory);
  epilogue.expect_no_alias("bitmap", mask);
  epilogue.expect_no_alias("row_start", start);
  const tt_bitmap weight = {held.memory.data(), held.dtype,
                            static_cast<const uint8_t*>(mask.data()),
                            static_cast<const int64_t*>(start.data()), kept.size(0)};
  run([&](const tt_parallel* pool) {
    return tt_bitmap_linear(rows.data, dtype, rows.stride, &weight, rows.M, N, rows.K,
                            &epilogue.values, pool);
  });
  return epilogue.result;
}

py::object block_linear(py::handle x, py::handle values, py::handle crow, py::handle col, int64_t N,
                        py::handle weight_scale, py::handle bias, const std::string& activation,
                        py::handle out_dtype, py::handle out) {
  constexpr const char* op = "block_linear";
  const Array array(op, "x", x), kept(op, "values", values);
  const tt_dtype dtype = array.expect_float();
  const Rows rows(array);
  kept.expect_rank(3);
  const Values held(op, kept, array, dtype, !weight_scale.is_none());
  const int64_t bn = kept.size(1), bk = kept.size(2);
  if (bn < 1 || bk < 1 || N < 0) {
    refuse(op, "values [blocks, bn, bk] with bn, bk >= 1 and N >= 0, got " + kept.describe() +
                   " and N=" + number(N));
  }
  const py::array rows_of = take_vector(op, "crow", crow, Dtype::kInt32, (N + bn - 1) / bn + 1);
  const py::array columns = take_vector(op, "col", col, Dtype::kInt32, kept.size(0));
  const Scale scale = take_scale(op, weight_scale, N);
  const Epilogue epilogue(op, scale, bias, activation, out_dtype, out, dtype,
                          shape_with_last(array, N));
  epilogue.expect_no_alias("x", rows.memory);
  epilogue.expect_no_alias("values", held.memory);
  epilogue.expect_no_alias("crow", rows_of);
  epilogue.expect_no_alias("col", columns);
  const tt_block_weight weight = {held.memory.data(),
                                  held.dtype,
                                  static_cast<const int32_t*>(rows_of.data()),
                                  static_cast<const int32_t*>(columns.data()),
                                  kept.size(0),
                                  bn,
                                  bk,
                                  N,
                                  rows.K};
  run([&](const tt_parallel* pool) {
    return tt_block_linear(rows.data, dtype, rows.stride, &weight, rows.M, &epilogue.values, pool);
  });
  return epilogue.result;
}

}  // namespace

void define_sparse(py::module_& m) {
  m.def("bitmap_row_start", &bitmap_row_start);
  m.def("bitmap_linear", &bitmap_linear);
  m.def("block_linear", &block_linear);
}

}  // namespace trimtab
