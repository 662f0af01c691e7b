#include "array.h"

#include <trimtab/int8_pack.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dlpack.h"

namespace trimtab {
namespace {

constexpr const char* kActivations[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};

// NumPy's own numbers for its builtin types.
constexpr int kNumInt8 = 1, kNumUint8 = 2, kNumUint16 = 4, kNumInt32 = 5, kNumInt64 = 7,
              kNumFloat32 = 11, kNumFloat16 = 23;

Dtype classify(const py::dtype& dtype) {
  switch (dtype.num()) {
    case kNumInt8: return Dtype::kInt8;
    case kNumFloat32: return dtype.byteorder() == '>' ? Dtype::kOther : Dtype::kFloat32;
    case kNumFloat16: return dtype.byteorder() == '>' ? Dtype::kOther : Dtype::kFloat16;
    default: break;
  }
  // By kind and size: int64 is "long" or "long long".
  if (dtype.byteorder() != '>') {
    if (dtype.kind() == 'u' && dtype.itemsize() == 1) return Dtype::kUint8;
    if (dtype.kind() == 'i' && dtype.itemsize() == 4) return Dtype::kInt32;
    if (dtype.kind() == 'i' && dtype.itemsize() == 8) return Dtype::kInt64;
  }
  // ml_dtypes registers its types when it is imported; the name is all that is known of them here.
  const bool bfloat16 =
      dtype.itemsize() == 2 && py::cast<std::string>(dtype.attr("name")) == "bfloat16";
  return bfloat16 ? Dtype::kBfloat16 : Dtype::kOther;
}

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kInt8: return "int8";
    case Dtype::kFloat32: return "float32";
    case Dtype::kBfloat16: return "bfloat16";
    case Dtype::kFloat16: return "float16";
    case Dtype::kUint8: return "uint8";
    case Dtype::kInt32: return "int32";
    case Dtype::kInt64: return "int64";
    case Dtype::kOther: break;
  }
  return "another dtype";
}

std::string describe_shape(const py::ssize_t* shape, size_t rank) {
  std::string text = "[";
  for (size_t d = 0; d < rank; ++d) text += (d > 0 ? ", " : "") + std::to_string(shape[d]);
  return text + "]";
}

std::string prefix(const char* op, const char* name) {
  return std::string(op) + ": expected " + name;
}

bool aligned(const py::array& memory) {
  return reinterpret_cast<uintptr_t>(memory.data()) % size_t(memory.itemsize()) == 0;
}

// The one stride, in bytes, with which all leading dimensions walk memory: [2, 3, K] with strides
// [3 s, s, 1]. False if there is none.
bool row_stride(const py::array& memory, int64_t* stride) {
  bool first = true;
  int64_t expected = 0;
  *stride = 0;
  for (int64_t d = memory.ndim() - 2; d >= 0; --d) {
    if (memory.shape(d) == 1) continue;
    if (first) *stride = memory.strides(d);
    if (!first && memory.strides(d) != expected) return false;
    first = false;
    expected = memory.strides(d) * memory.shape(d);
  }
  return *stride % memory.itemsize() == 0;
}

bool unit_rows(const py::array& memory, int64_t* stride) {
  const int64_t last = memory.ndim() - 1;
  const bool unit = memory.shape(last) <= 1 || memory.strides(last) == memory.itemsize();
  return unit && aligned(memory) && row_stride(memory, stride);
}

py::dtype dlpack_dtype(const dlpack::Tensor& tensor, const std::string& where, Dtype* dtype) {
  const int kind = tensor.type_lanes == 1 ? tensor.type_code * 256 + tensor.type_bits : -1;
  switch (kind) {
    case dlpack::kInt * 256 + 8: *dtype = Dtype::kInt8; return py::dtype(kNumInt8);
    case dlpack::kFloat * 256 + 32: *dtype = Dtype::kFloat32; return py::dtype(kNumFloat32);
    case dlpack::kFloat * 256 + 16: *dtype = Dtype::kFloat16; return py::dtype(kNumFloat16);
    case dlpack::kUInt * 256 + 8: *dtype = Dtype::kUint8; return py::dtype(kNumUint8);
    case dlpack::kInt * 256 + 32: *dtype = Dtype::kInt32; return py::dtype(kNumInt32);
    case dlpack::kInt * 256 + 64: *dtype = Dtype::kInt64; return py::dtype(kNumInt64);
    case dlpack::kBfloat * 256 + 16: *dtype = Dtype::kBfloat16; return py::dtype(kNumUint16);
    default: break;
  }
  throw py::type_error(where + " of int8, float32, bfloat16 or float16, got DLPack type code " +
                       std::to_string(tensor.type_code) + " with " +
                       std::to_string(tensor.type_bits) + " bits and " +
                       std::to_string(tensor.type_lanes) + " lanes");
}

// An array over the tensor's memory; `owner` frees it.
py::array view(const dlpack::Tensor& tensor, const py::capsule& owner, bool read_only,
               const std::string& where, Dtype* dtype) {
  const py::dtype storage = dlpack_dtype(tensor, where, dtype);
  std::vector<py::ssize_t> shape(tensor.shape, tensor.shape + tensor.ndim), strides(shape.size());
  py::ssize_t step = storage.itemsize();
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = tensor.strides != nullptr ? tensor.strides[d] * storage.itemsize() : step;
    step *= shape[d];
  }
  static char nothing[64];  // NumPy would allocate for a null pointer, which empty tensors may have
  char* data = static_cast<char*>(tensor.data);
  data = data == nullptr ? nothing : data + tensor.byte_offset;
  py::array array(storage, shape, strides, data, owner);
  if (read_only) array.attr("flags").attr("writeable") = false;
  return array;
}

// A consumer renames the capsule, which makes it the tensor's owner, and calls the deleter once.
template <class Managed>
Managed* consume(const py::capsule& capsule, const char* used_name) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), capsule.name()));
  if (managed == nullptr || PyCapsule_SetName(capsule.ptr(), used_name) != 0) {
    throw py::error_already_set();
  }
  return managed;
}

template <class Managed>
py::capsule owner_of(Managed* managed) {
  return py::capsule(managed, [](void* opaque) {
    auto* self = static_cast<Managed*>(opaque);
    if (self->deleter != nullptr) self->deleter(self);
  });
}

py::array from_dlpack(py::handle object, const std::string& where, Dtype* dtype) {
  const py::tuple device = object.attr("__dlpack_device__")();
  const int type = py::cast<int>(device[0]);
  if (type != dlpack::kCpu && type != dlpack::kCudaHost && type != dlpack::kRocmHost) {
    throw py::value_error(where + " in CPU memory, got DLPack device type " + std::to_string(type));
  }
  py::capsule capsule;
  try {
    capsule = object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(dlpack::kMajor, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // a producer from before DLPack 1.0
    capsule = object.attr("__dlpack__")();
  }
  if (std::strcmp(capsule.name(), "dltensor_versioned") == 0) {
    auto* managed = consume<dlpack::ManagedVersioned>(capsule, "used_dltensor_versioned");
    const py::capsule owner = owner_of(managed);
    if (managed->major != dlpack::kMajor) {
      throw py::value_error(where + " as DLPack 1.x, got version " +
                            std::to_string(managed->major));
    }
    return view(managed->tensor, owner, managed->flags & dlpack::kReadOnly, where, dtype);
  }
  auto* managed = consume<dlpack::Managed>(capsule, "used_dltensor");
  return view(managed->tensor, owner_of(managed), false, where, dtype);
}

py::dtype numpy_dtype(const char* op, tt_dtype dtype) {
  if (dtype == TT_I8) return py::dtype(kNumInt8);
  if (dtype == TT_F32) return py::dtype(kNumFloat32);
  if (dtype == TT_F16) return py::dtype(kNumFloat16);
  try {
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    throw py::type_error(std::string(op) +
                         ": expected the package ml_dtypes for a new bfloat16 array, which NumPy "
                         "alone does not have; install it, or give a bfloat16 out=");
  }
}

// Resolved here and not at every call: counting the cores asks the kernel.
std::atomic<int> threads{tt_own_pool(0).threads};

}  // namespace

py::array adjacent(const py::array& memory) {
  if ((memory.flags() & py::array::c_style) && aligned(memory)) return memory;
  return py::module_::import("numpy").attr("array")(memory, py::arg("order") = "C");
}

void check_status(tt_status status) {
  if (status == TT_OK) return;
  PyErr_SetString(status == TT_OUT_OF_MEMORY ? PyExc_MemoryError : PyExc_ValueError,
                  tt_last_error());
  throw py::error_already_set();
}

Array::Array(const char* op_name, const char* argument, py::handle object)
    : op(op_name), name(argument), dtype(Dtype::kOther) {
  if (py::isinstance<py::array>(object)) {
    memory = py::reinterpret_borrow<py::array>(object);
    dtype = classify(memory.dtype());
  } else if (py::hasattr(object, "__dlpack__")) {
    memory = from_dlpack(object, prefix(op, name), &dtype);
  } else {
    throw py::type_error(prefix(op, name) + " as a NumPy array or an object with __dlpack__, got " +
                         py::cast<std::string>(py::type::of(object).attr("__name__")));
  }
}

std::string Array::describe() const {
  const std::string type = dtype == Dtype::kOther
                               ? py::cast<std::string>(py::str(py::object(memory.dtype())))
                               : dtype_name(dtype);
  return describe_shape(memory.shape(), size_t(rank())) + " " + type;
}

void Array::expect_dtype(Dtype expected) const {
  if (dtype == expected) return;
  throw py::type_error(prefix(op, name) + " of " + dtype_name(expected) + ", got " + describe());
}

tt_dtype Array::expect_float() const {
  switch (dtype) {
    case Dtype::kFloat32: return TT_F32;
    case Dtype::kBfloat16: return TT_BF16;
    case Dtype::kFloat16: return TT_F16;
    default: break;
  }
  throw py::type_error(prefix(op, name) + " of float32, bfloat16 or float16, got " + describe());
}

void Array::expect_rank(int64_t expected) const {
  if (rank() == expected) return;
  throw py::value_error(prefix(op, name) + " of rank " + std::to_string(expected) + ", got " +
                        describe());
}

Rows::Rows(const Array& array) : memory(array.memory) {
  if (array.rank() < 1) {
    throw py::value_error(prefix(array.op, array.name) + " of at least one dimension, got " +
                          array.describe());
  }
  K = array.size(array.rank() - 1);
  for (int64_t d = 0; d + 1 < array.rank(); ++d) M *= array.size(d);
  int64_t bytes = 0;
  if (unit_rows(memory, &bytes)) {
    stride = bytes / memory.itemsize();
  } else {
    memory = adjacent(memory);
    stride = K;
  }
  data = memory.data();
}

Scale::Scale(const char* op, const char* name, py::handle object, bool grouped) {
  const Array array(op, name, object);
  array.expect_dtype(Dtype::kFloat32);
  if (grouped && array.rank() == 2) {
    groups = array.size(0);
  } else {
    array.expect_rank(1);
  }
  N = array.size(array.rank() - 1);
  memory = adjacent(array.memory);
}

py::array empty_packed(int64_t bytes) {
  // aligned_alloc takes multiples of the alignment.
  void* data = std::aligned_alloc(
      TT_INT8_PACK_ALIGNMENT,
      size_t(bytes + TT_INT8_PACK_ALIGNMENT - 1) / TT_INT8_PACK_ALIGNMENT * TT_INT8_PACK_ALIGNMENT);
  if (data == nullptr) throw std::bad_alloc();
  return py::array(py::dtype(kNumInt8), {bytes}, {1}, data, py::capsule(data, std::free));
}

void expect_packed(const Array& packed, int64_t N, int64_t K) {
  packed.expect_dtype(Dtype::kInt8);
  packed.expect_rank(1);
  const int64_t bytes = tt_int8_packed_size(N, K);
  const std::string where = prefix(packed.op, packed.name);
  if (packed.size(0) != bytes) {
    throw py::value_error(where + " as the " + std::to_string(bytes) +
                          " bytes that int8_pack makes for N=" + std::to_string(N) +
                          " and K=" + std::to_string(K) + ", got " + packed.describe());
  }
  if (packed.memory.strides(0) != 1) {
    throw py::value_error(where + " with adjacent elements, got a stride of " +
                          std::to_string(packed.memory.strides(0)));
  }
  if (reinterpret_cast<uintptr_t>(packed.memory.data()) % TT_INT8_PACK_ALIGNMENT != 0) {
    throw py::value_error(
        where + " aligned to 64 bytes, as int8_pack returns it, got an address " +
        std::to_string(reinterpret_cast<uintptr_t>(packed.memory.data()) % TT_INT8_PACK_ALIGNMENT) +
        " bytes past such a boundary");
  }
}

Weight::Weight(const char* op, const char* name, py::handle object, int64_t N, int64_t K) {
  const Array array(op, name, object);
  array.expect_dtype(Dtype::kInt8);
  if (array.rank() == 1) {
    expect_packed(array, N, K);
    memory = array.memory;
  } else {
    if (array.rank() != 2 || array.size(0) != N || array.size(1) != K) {
      throw py::value_error(prefix(op, name) + " as [N=" + std::to_string(N) +
                            ", K=" + std::to_string(K) + "] or packed, got " + array.describe());
    }
    Rows rows(array);
    if (rows.M > 1 && rows.stride < K) {  // tt_int8_pack takes no reversed or repeated rows
      rows.memory = adjacent(rows.memory);
      rows.data = rows.memory.data();
      rows.stride = K;
    }
    memory = empty_packed(tt_int8_packed_size(N, K));
    int8_t* packed = static_cast<int8_t*>(memory.mutable_data());
    const tt_parallel pool = own_pool();
    const auto pack = [&] {
      const py::gil_scoped_release unlocked;
      return tt_int8_pack(static_cast<const int8_t*>(rows.data), rows.stride, N, K, packed, &pool);
    };
    check_status(pack());
  }
}

tt_dtype parse_out_dtype(const char* op, py::handle object, bool int8) {
  std::string name;
  if (py::isinstance<py::str>(object)) {
    name = py::cast<std::string>(object);
  } else {
    name = py::cast<std::string>(py::module_::import("numpy").attr("dtype")(object).attr("name"));
  }
  if (name == "float32") return TT_F32;
  if (name == "bfloat16") return TT_BF16;
  if (name == "float16") return TT_F16;
  if (name == "int8" && int8) return TT_I8;
  throw py::type_error(std::string(op) + ": expected out_dtype float32, bfloat16 or float16" +
                       (int8 ? ", or int8 with out_scale" : "") + ", got " + name);
}

tt_activation parse_activation(const char* op, const std::string& name) {
  for (int i = TT_ACT_NONE; i <= TT_ACT_SILU; ++i) {
    if (name == kActivations[i]) return tt_activation(i);
  }
  throw py::value_error(std::string(op) +
                        ": expected activation none, relu, gelu, gelu_tanh or silu, got \"" + name +
                        "\"");
}

std::vector<py::ssize_t> shape_with_last(const Array& rows_of, int64_t last) {
  std::vector<py::ssize_t> shape(rows_of.memory.shape(), rows_of.memory.shape() + rows_of.rank());
  shape.back() = last;
  return shape;
}

tt_parallel own_pool() { return tt_own_pool(threads.load(std::memory_order_relaxed)); }
void set_threads(int count) {
  threads.store(tt_own_pool(count).threads, std::memory_order_relaxed);
}

Epilogue::Epilogue(const char* op, const Scale& scale, py::handle bias,
                   const std::string& activation, py::handle out_dtype, py::handle out,
                   tt_dtype otherwise, const std::vector<py::ssize_t>& shape, py::handle out_scale)
    : values(), op_(op) {
  const bool int8 = out_scale.ptr() != nullptr;
  values.b_scale = scale.data();
  values.activation = parse_activation(op, activation);
  if (!bias.is_none()) take_bias(bias, scale.N);
  values.out_dtype = out_dtype.is_none() ? otherwise : parse_out_dtype(op, out_dtype, int8);
  if (out.is_none()) {
    out_ = py::array(numpy_dtype(op, values.out_dtype), shape);
    result = out_;
    values.out_stride = scale.N;
  } else {
    const Array array(op, "out", out);
    const tt_dtype own = int8 && array.dtype == Dtype::kInt8 ? TT_I8 : array.expect_float();
    if (!out_dtype.is_none() && own != values.out_dtype) {
      throw py::type_error(prefix(op, "out") + " of the given out_dtype, got " + array.describe());
    }
    values.out_dtype = own;
    take_out(array, shape);
    result = py::reinterpret_borrow<py::object>(out);
    expect_no_alias("the scale", scale.memory);
    if (!bias.is_none()) expect_no_alias("bias", bias_);
  }
  values.out = out_.mutable_data();
  if (int8) take_out_scale(out_scale);
}

void Epilogue::take_bias(py::handle bias, int64_t N) {
  const Array array(op_, "bias", bias);
  values.bias_dtype = array.expect_float();
  array.expect_rank(1);
  if (array.size(0) != N) {
    throw py::value_error(prefix(op_, "bias") + " [N=" + std::to_string(N) + "], got " +
                          array.describe());
  }
  bias_ = adjacent(array.memory);
  values.bias = bias_.data();
}

void Epilogue::take_out_scale(py::handle out_scale) {
  const bool int8 = values.out_dtype == TT_I8;
  if (out_scale.is_none()) {
    if (int8) {
      throw py::type_error(prefix(op_, "out_scale") + " [1] float32 for int8 out, got None");
    }
    return;
  }
  if (!int8) throw py::type_error(prefix(op_, "out_scale") + " with int8 out alone");
  const Array array(op_, "out_scale", out_scale);
  array.expect_dtype(Dtype::kFloat32);
  if (array.rank() != 1 || array.size(0) != 1) {
    throw py::value_error(prefix(op_, "out_scale") + " [1], got " + array.describe());
  }
  out_scale_ = adjacent(array.memory);
  values.out_scale = static_cast<const float*>(out_scale_.data());
  expect_no_alias("out_scale", out_scale_);
}

void Epilogue::take_out(const Array& array, const std::vector<py::ssize_t>& shape) {
  const std::string where = prefix(op_, "out");
  const py::ssize_t* own = array.memory.shape();
  if (std::vector<py::ssize_t>(own, own + array.rank()) != shape) {
    throw py::value_error(where + " of shape " + describe_shape(shape.data(), shape.size()) +
                          ", got " + array.describe());
  }
  if (!array.memory.writeable()) throw py::value_error(where + " writable, got a read-only array");
  out_ = array.memory;
  callers_ = true;
  const int64_t N = shape.back();
  int64_t bytes = 0;
  const bool rows = unit_rows(out_, &bytes);
  values.out_stride = bytes / out_.itemsize();
  const bool one_row = out_.size() <= N;
  if (!rows || (!one_row && values.out_stride < N)) {
    throw py::value_error(
        where + " as aligned rows of adjacent elements that do not overlap, got " + "strides of " +
        describe_shape(out_.strides(), size_t(array.rank())) + " bytes");
  }
  if (one_row) values.out_stride = N;
}

void Epilogue::expect_no_alias(const char* name, const py::array& input) const {
  if (!callers_) return;
  bool shared = true;  // also where NumPy gives up finding out
  try {
    constexpr int kMaxWork = 10000;
    shared = py::cast<bool>(py::module_::import("numpy").attr("shares_memory")(
        out_, input, py::arg("max_work") = kMaxWork));
  } catch (py::error_already_set&) {
  }
  if (shared) {
    throw py::value_error(prefix(op_, "out") + " in memory of its own, got one that shares " +
                          "memory with " + name);
  }
}

}  // namespace trimtab
