// trimtab._numpy: the C interface on NumPy and DLPack arrays, without torch. trimtab/numpy/__init__.py
// documents these functions; here are their checks and calls, in the order of the header files.
#include <trimtab/int8_linear.h>
#include <trimtab/int8_mm.h>
#include <trimtab/int8_pack.h>
#include <trimtab/int8_weight_mm.h>
#include <trimtab/quantize_int8.h>
#include <trimtab/rms_norm_quantize_int8.h>
#include <trimtab/silu_mul_quantize_int8.h>

#include <algorithm>

#include "array.h"

namespace trimtab {
namespace {

// The int32 sum of int8_mm and int8_linear; said before a weight is packed for the call.
void expect_exact(const char* op, int64_t K) {
  if (K <= TT_INT8_MAX_K) return;
  throw py::value_error(std::string(op) + ": expected K <= " + number(TT_INT8_MAX_K) +
                        ", where the int32 sum is exact, got K=" + number(K));
}

// New q [..., K] int8 and scale [...] float32 for an input [..., K].
struct Codes {
  py::array q, scale;
  int8_t* q_data;
  float* scale_data;

  explicit Codes(const Array& of) {
    std::vector<py::ssize_t> shape = shape_with_last(of, of.size(of.rank() - 1));
    q = py::array(py::dtype::of<int8_t>(), shape);
    shape.pop_back();
    scale = py::array(py::dtype::of<float>(), shape);
    q_data = static_cast<int8_t*>(q.mutable_data());
    scale_data = static_cast<float*>(scale.mutable_data());
  }
  py::tuple tuple() const { return py::make_tuple(q, scale); }
};

py::tuple quantize_int8(py::handle x) {
  const Array array("quantize_int8", "x", x);
  const tt_dtype dtype = array.expect_float();
  const Rows rows(array);
  const Codes codes(array);
  run([&](const tt_parallel* pool) {
    return tt_quantize_int8(rows.data, dtype, rows.stride, rows.M, rows.K, codes.q_data, rows.K,
                            codes.scale_data, pool);
  });
  return codes.tuple();
}

py::tuple rms_norm_quantize_int8(py::handle x, py::handle weight, double eps) {
  constexpr const char* op = "rms_norm_quantize_int8";
  const Array array(op, "x", x), factors(op, "weight", weight);
  const tt_dtype dtype = array.expect_float(), weight_dtype = factors.expect_float();
  const Rows rows(array);
  factors.expect_rank(1);
  if (factors.size(0) != rows.K) {
    throw py::value_error(std::string(op) + ": expected weight [K=" + number(rows.K) + "], got " +
                          factors.describe());
  }
  if (weight_dtype != dtype && weight_dtype != TT_F32) {
    throw py::type_error(std::string(op) + ": expected weight of float32 or x's dtype for x " +
                         array.describe() + ", got " + factors.describe());
  }
  const py::array memory = adjacent(factors.memory);
  const Codes codes(array);
  run([&](const tt_parallel* pool) {
    return tt_rms_norm_quantize_int8(rows.data, dtype, rows.stride, memory.data(), weight_dtype,
                                     float(eps), rows.M, rows.K, codes.q_data, rows.K,
                                     codes.scale_data, pool);
  });
  return codes.tuple();
}

py::tuple silu_mul_quantize_int8(py::handle gate, py::handle up) {
  constexpr const char* op = "silu_mul_quantize_int8";
  const Array left(op, "gate", gate), right(op, "up", up);
  const tt_dtype dtype = left.expect_float(), up_dtype = right.expect_float();
  const Rows g(left), u(right);
  if (up_dtype != dtype) {
    throw py::type_error(std::string(op) + ": expected up of gate's dtype, " + left.describe() +
                         ", got " + right.describe());
  }
  if (shape_with_last(right, u.K) != shape_with_last(left, g.K)) {
    throw py::value_error(std::string(op) + ": expected up like gate, " + left.describe() +
                          ", got " + right.describe());
  }
  const Codes codes(left);
  run([&](const tt_parallel* pool) {
    return tt_silu_mul_quantize_int8(g.data, g.stride, u.data, u.stride, dtype, g.M, g.K,
                                     codes.q_data, g.K, codes.scale_data, pool);
  });
  return codes.tuple();
}

py::array int8_pack(py::handle b) {
  const Array array("int8_pack", "b", b);
  array.expect_dtype(Dtype::kInt8);
  array.expect_rank(2);
  return Weight("int8_pack", "b", b, array.size(0), array.size(1)).memory;
}

py::array int8_unpack(py::handle packed, int64_t N, int64_t K) {
  if (N < 0 || K < 0) {
    throw py::value_error("int8_unpack: expected sizes >= 0, got N=" + number(N) +
                          " K=" + number(K));
  }
  const Array array("int8_unpack", "packed", packed);
  expect_packed(array, N, K);
  py::array b(py::dtype::of<int8_t>(), std::vector<py::ssize_t>{N, K});
  const auto* from = static_cast<const int8_t*>(array.memory.data());
  auto* to = static_cast<int8_t*>(b.mutable_data());
  run([&](const tt_parallel* pool) { return tt_int8_unpack(from, N, K, to, K, pool); });
  return b;
}

py::object int8_mm(py::handle a, py::handle b, py::handle a_scale, py::handle b_scale,
                   py::handle bias, const std::string& activation, py::handle out_dtype,
                   py::handle out, py::handle out_scale) {
  constexpr const char* op = "int8_mm";
  const Array array(op, "a", a);
  array.expect_dtype(Dtype::kInt8);
  array.expect_rank(2);
  const Rows rows(array);
  expect_exact(op, rows.K);
  const Scale row_scale(op, "a_scale", a_scale), scale(op, "b_scale", b_scale);
  if (row_scale.N != rows.M) {
    throw py::value_error("int8_mm: expected a_scale [M=" + number(rows.M) + "], got [" +
                          number(row_scale.N) + "]");
  }
  const Epilogue epilogue(op, scale, bias, activation, out_dtype, out, TT_F32,
                          shape_with_last(array, scale.N), out_scale);
  const Weight weight(op, "b", b, scale.N, rows.K);
  epilogue.expect_no_alias("a", rows.memory);
  epilogue.expect_no_alias("a_scale", row_scale.memory);
  epilogue.expect_no_alias("b", weight.memory);
  run([&](const tt_parallel* pool) {
    return tt_int8_mm(static_cast<const int8_t*>(rows.data), rows.stride, row_scale.data(),
                      weight.data(), rows.M, scale.N, rows.K, &epilogue.values, pool);
  });
  return epilogue.result;
}

py::object int8_linear(py::handle x, py::handle weight, py::handle weight_scale, py::handle bias,
                       const std::string& activation, py::handle out_dtype, py::handle out,
                       py::handle out_scale) {
  constexpr const char* op = "int8_linear";
  const Array array(op, "x", x);
  const tt_dtype dtype = array.expect_float();
  const Rows rows(array);
  expect_exact(op, rows.K);
  const Scale scale(op, "weight_scale", weight_scale);
  const Epilogue epilogue(op, scale, bias, activation, out_dtype, out, dtype,
                          shape_with_last(array, scale.N), out_scale);
  const Weight packed(op, "weight", weight, scale.N, rows.K);
  epilogue.expect_no_alias("x", rows.memory);
  epilogue.expect_no_alias("weight", packed.memory);
  run([&](const tt_parallel* pool) {
    return tt_int8_linear(rows.data, dtype, rows.stride, packed.data(), rows.M, scale.N, rows.K,
                          &epilogue.values, pool);
  });
  return epilogue.result;
}

// Columns of K that share a scale; checked together with the shape of the scales.
int64_t take_group_size(const py::object& group_size, int64_t K, const Scale& scale) {
  const std::string expected = "int8_weight_mm: expected ";
  const int64_t size =
      group_size.is_none() ? std::max<int64_t>(K, 1) : py::cast<int64_t>(group_size);
  if (size < 1) throw py::value_error(expected + "group_size >= 1 or None, got " + number(size));
  if (size < K && size % 4 != 0) {
    throw py::value_error(expected + "group_size to be a multiple of 4, or K=" + number(K) +
                          " or more, got " + number(size));
  }
  const int64_t groups = K > 0 ? (K - 1) / size + 1 : 1;
  if (scale.groups != groups) {
    throw py::value_error(expected + "weight_scale [groups=" + number(groups) +
                          ", N] for K=" + number(K) + " and group_size " + number(size) + ", got " +
                          number(scale.groups) + " groups");
  }
  return size;
}

// zero_point [groups, N] int8, or [N] for one group.
py::array take_zero_point(py::handle object, const Scale& scale) {
  const Array array("int8_weight_mm", "zero_point", object);
  array.expect_dtype(Dtype::kInt8);
  const bool flat = array.rank() == 1 && scale.groups == 1;
  const bool same = (flat || (array.rank() == 2 && array.size(0) == scale.groups)) &&
                    array.size(array.rank() - 1) == scale.N;
  if (!same) {
    throw py::value_error("int8_weight_mm: expected zero_point [groups=" + number(scale.groups) +
                          ", N=" + number(scale.N) + "], like weight_scale, got " +
                          array.describe());
  }
  return adjacent(array.memory);
}

py::object int8_weight_mm(py::handle x, py::handle weight, py::handle weight_scale,
                          py::handle zero_point, py::handle bias, const py::object& group_size,
                          const std::string& activation, py::handle out_dtype, py::handle out) {
  constexpr const char* op = "int8_weight_mm";
  const Array array(op, "x", x);
  const tt_dtype dtype = array.expect_float();
  const Rows rows(array);
  const Scale scale(op, "weight_scale", weight_scale, true);
  const int64_t group = take_group_size(group_size, rows.K, scale);
  py::array zero;
  if (!zero_point.is_none()) zero = take_zero_point(zero_point, scale);
  const Epilogue epilogue(op, scale, bias, activation, out_dtype, out, dtype,
                          shape_with_last(array, scale.N));
  const Weight packed(op, "weight", weight, scale.N, rows.K);
  epilogue.expect_no_alias("x", rows.memory);
  epilogue.expect_no_alias("weight", packed.memory);
  const auto* zero_data = zero_point.is_none() ? nullptr : static_cast<const int8_t*>(zero.data());
  run([&](const tt_parallel* pool) {
    return tt_int8_weight_mm(rows.data, dtype, rows.stride, packed.data(), group, zero_data, rows.M,
                             scale.N, rows.K, &epilogue.values, pool);
  });
  return epilogue.result;
}

std::string get_isa() {
  tt_isa isa;
  check_status(tt_get_isa(&isa));
  return tt_isa_name(isa);
}

py::list available_isas() {
  py::list names;
  for (int isa = TT_ISA_SCALAR; isa <= TT_ISA_AMX; ++isa) {
    if (tt_isa_available(tt_isa(isa))) names.append(tt_isa_name(tt_isa(isa)));
  }
  return names;
}

void set_num_threads(int count) {
  if (count < 0) {
    throw py::value_error("set_num_threads: expected 0 (one per core) or more, got " +
                          number(count));
  }
  set_threads(count);
}

}  // namespace
}  // namespace trimtab

PYBIND11_MODULE(_numpy, m, pybind11::mod_gil_not_used()) {
  using namespace trimtab;
  m.doc() = "trimtab's kernels on NumPy and DLPack arrays; see trimtab.numpy";
  m.def("quantize_int8", &quantize_int8);
  m.def("rms_norm_quantize_int8", &rms_norm_quantize_int8);
  m.def("silu_mul_quantize_int8", &silu_mul_quantize_int8);
  m.def("int8_pack", &int8_pack);
  m.def("int8_unpack", &int8_unpack);
  m.def("int8_mm", &int8_mm);
  m.def("int8_linear", &int8_linear);
  m.def("int8_weight_mm", &int8_weight_mm);
  define_sparse(m);
  m.def("abi_version", &tt_abi_version);
  m.def("get_isa", &get_isa);
  m.def("set_isa", [](const std::string& name) { check_status(tt_set_isa(name.c_str())); });
  m.def("available_isas", &available_isas);
  m.def("get_num_threads", [] { return own_pool().threads; });
  m.def("set_num_threads", &set_num_threads);
}
