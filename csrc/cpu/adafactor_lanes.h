// The loops of adafactor_kernels.h over a vector type V. Sums run in 32 lanes of fp32, column c of a row, or
// element i of a block, in lane c or i % 32 whatever the width of V, and are added up in double: equal bits
// from all.
#pragma once
#include "adafactor_kernels.h"
#include "optim_lanes.h"

namespace trimtab {
namespace {

template <class V>
struct SquareLanes {
  static constexpr int kLanes = 32, kVectors = kLanes / V::lanes;
  V sums[kVectors];

  TT_INLINE SquareLanes() {
    for (int k = 0; k < kVectors; ++k) sums[k] = V(0.0f);
  }
  TT_INLINE void add(int k, V x) { sums[k] = fma(x, x, sums[k]); }
  // Four chains, so that no addition waits for the one before.
  TT_INLINE double total() const {
    float lanes[kLanes];
    for (int k = 0; k < kVectors; ++k) sums[k].store(lanes + k * V::lanes);
    double chain[4] = {};
    for (int i = 0; i < kLanes; i += 4)
      for (int k = 0; k < 4; ++k) chain[k] += double(lanes[i + k]);
    return (chain[0] + chain[1]) + (chain[2] + chain[3]);
  }
};

// body(k, i, load, store): a vector at i that goes into vector k of SquareLanes.
template <class V, class Body>
TT_INLINE void for_lanes(int64_t n, Body&& body) {
  constexpr int kVectors = SquareLanes<V>::kVectors;
  int64_t i = 0;
  for (; i + SquareLanes<V>::kLanes <= n; i += SquareLanes<V>::kLanes) {
    for (int k = 0; k < kVectors; ++k) {
      body(
          k, i + k * V::lanes, [](const float* p) { return V::load(p); },
          [](float* p, V v) { v.store(p); });
    }
  }
  for (int k = 0; k < kVectors && i < n; ++k, i += V::lanes) {
    const int count = int(n - i < V::lanes ? n - i : V::lanes);
    body(
        k, i, [count](const float* p) { return V::load_n(p, count); },
        [count](float* p, V v) { v.store_n(p, count); });
  }
}

// Asks for what comes kAhead elements later: rows of a large matrix follow each other in memory, but at every
// 4 KiB the hardware's own prefetcher begins anew.
template <class V>
TT_INLINE void prefetch(const float* x, int64_t i) {
  constexpr int64_t kAhead = 1024;
  if (V::lanes == 16 || (V::lanes == 8 && i % 16 == 0)) __builtin_prefetch(x + i + kAhead);
}

template <class V>
void square_sums(const float* g, int64_t rows, int64_t columns, double* row_sums,
                 float* column_sums) {
  for (int64_t r = 0; r < rows; ++r, g += columns) {
    SquareLanes<V> lanes;
    for_lanes<V>(columns, [&](int k, int64_t i, auto load, auto store) {
      prefetch<V>(g, i);
      const V x = load(g + i);
      lanes.add(k, x);
      store(column_sums + i, fma(x, x, load(column_sums + i)));
    });
    row_sums[r] += lanes.total();
  }
}

// body(i, count, row_factor, column_factors): the parts of rows that elements begin .. begin + n - 1 lie in,
// each from element begin + i on.
template <class Body>
TT_INLINE void for_rows(const AdafactorFactors& f, int64_t begin, int64_t n, Body&& body) {
  int64_t row = begin / f.columns, column = begin - row * f.columns;
  int64_t row_of_matrix = row;
  const float* columns = f.column;
  if (row >= f.rows) {
    const int64_t matrix = row / f.rows;
    row_of_matrix = row - matrix * f.rows;
    columns += matrix * f.columns;
  }
  for (int64_t i = 0, count; i < n; i += count, column = 0, ++row) {
    count = f.columns - column < n - i ? f.columns - column : n - i;
    body(i, count, f.row[row], columns + column);
    if (++row_of_matrix == f.rows) row_of_matrix = 0, columns += f.columns;
  }
}

template <class V>
void direction_squares(const float* p, const float* g, const AdafactorFactors& factors,
                       int64_t begin, int64_t n, float limit, double* squares) {
  SquareLanes<V> params, directions;
  const bool in_one_row = begin % factors.columns + n <= factors.columns;
  if (in_one_row || factors.columns % SquareLanes<V>::kLanes == 0) {  // rows begin in lane 0
    for_rows(factors, begin, n, [&](int64_t at, int64_t count, float row, const float* column) {
      for_lanes<V>(count, [&](int k, int64_t i, auto load, auto) {
        params.add(k, load(p + at + i));
        const V x = load(g + at + i);
        directions.add(k, adafactor_direction(x, V(row), load(column + i), V(limit)));
      });
    });
  } else {
    alignas(64) float u[kOptimBlock];
    for_rows(factors, begin, n, [&](int64_t at, int64_t count, float row, const float* column) {
      for_vectors<V>(count, [&](int64_t i, auto load, auto store) {
        const V x = load(g + at + i);
        store(u + at + i, adafactor_direction(x, V(row), load(column + i), V(limit)));
      });
    });
    for_lanes<V>(n, [&](int k, int64_t i, auto load, auto) {
      params.add(k, load(p + i));
      directions.add(k, load(u + i));
    });
  }
  squares[0] += params.total();
  squares[1] += directions.total();
}

template <class V>
void update_matrix(float* p, const float* g, const AdafactorFactors& factors, int64_t begin,
                   int64_t n, const AdafactorConstants& constants) {
  const AdafactorConstants c = constants;
  for_rows(factors, begin, n, [&](int64_t at, int64_t count, float row, const float* column) {
    for_vectors<V>(count, [&](int64_t i, auto load, auto store) {
      prefetch<V>(p + at, i);
      prefetch<V>(g + at, i);
      const V u = adafactor_direction(load(g + at + i), V(row), load(column + i), V(c.limit));
      store(p + at + i, adafactor_update(load(p + at + i), u, V(c.decay), V(c.rate)));
    });
  });
}

template <class V>
void average_sums(float* x, const double* sums, double count, double weight, int64_t n) {
  const Lerp average = lerp_constants(weight);
  for (int64_t i = 0; i < n; ++i)
    x[i] = lerp(F32x1(x[i]), F32x1(float(sums[i] / count)), average).v;
}

template <class V>
void average_squares(float* variance, const float* g, double weight, int64_t n) {
  const Lerp average = lerp_constants(weight);
  for_vectors<V>(n, [&](int64_t i, auto load, auto store) {
    const V x = load(g + i);
    store(variance + i, lerp(load(variance + i), x * x, average));
  });
}

template <class V>
void vector_squares(const float* p, const float* g, const float* variance, float limit,
                    double* squares, int64_t n) {
  SquareLanes<V> params, directions;
  for_lanes<V>(n, [&](int k, int64_t i, auto load, auto) {
    params.add(k, load(p + i));
    const V x = load(g + i);
    directions.add(k, adafactor_vector_direction(x, load(variance + i), V(limit)));
  });
  squares[0] += params.total();
  squares[1] += directions.total();
}

template <class V>
void vector_update(float* p, const float* g, const float* variance,
                   const AdafactorConstants& constants, int64_t n) {
  const AdafactorConstants c = constants;
  for_vectors<V>(n, [&](int64_t i, auto load, auto store) {
    const V u = adafactor_vector_direction(load(g + i), load(variance + i), V(c.limit));
    store(p + i, adafactor_update(load(p + i), u, V(c.decay), V(c.rate)));
  });
}

template <class V>
AdafactorKernels adafactor_kernels() {
  return {square_sums<V>,     direction_squares<V>, update_matrix<V>, average_sums<V>,
          average_squares<V>, vector_squares<V>,    vector_update<V>};
}

}  // namespace
}  // namespace trimtab
