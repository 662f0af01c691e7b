// From NumPy and DLPack objects to the C interface: dtypes, views as 2-D rows, checks that name the op.
// A wrong dtype or kind of object is a TypeError, a wrong shape or layout a ValueError.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <trimtab/int8_mm.h>

#include <string>
#include <vector>

namespace trimtab {

namespace py = pybind11;

enum class Dtype { kInt8, kFloat32, kBfloat16, kFloat16, kUint8, kInt32, kInt64, kOther };

// Throws ValueError or MemoryError with tt_last_error() if status is not TT_OK.
void check_status(tt_status status);

inline std::string number(int64_t value) { return std::to_string(value); }

// An argument: the memory as it lies, and what its elements are. bfloat16 is ml_dtypes' or, from
// DLPack, uint16 with the same bits.
struct Array {
  const char* op;
  const char* name;
  py::array memory;
  Dtype dtype;

  // Takes a NumPy array or an object with __dlpack__ on the CPU, without a copy.
  Array(const char* op, const char* name, py::handle object);

  int64_t rank() const { return memory.ndim(); }
  int64_t size(int64_t dim) const { return memory.shape(dim); }
  std::string describe() const;  // "[2, 3] int8"
  void expect_dtype(Dtype expected) const;
  tt_dtype expect_float() const;  // or throws: expected float32, bfloat16 or float16
  void expect_rank(int64_t rank) const;
};

// The array itself if it is row-major and aligned, else a copy that is.
py::array adjacent(const py::array& memory);

// [..., K] as M rows of K adjacent elements, `stride` elements apart. Row strides of any sign are read
// in place; where the last dimension's isn't 1, the rows have no one stride, or an element isn't
// aligned, the array is copied once.
struct Rows {
  py::array memory;  // what data points into
  const void* data;
  int64_t M = 1, K = 0, stride = 0;
  explicit Rows(const Array& array);
};

// [N] float32, or [groups, N] where `groups` is given; adjacent, copied if need be.
struct Scale {
  py::array memory;
  int64_t groups = 1, N = 0;
  const float* data() const { return given ? static_cast<const float*>(memory.data()) : nullptr; }
  explicit Scale(int64_t outputs) : N(outputs), given(false) {}  // none, for float weights
  bool given = true;
  Scale(const char* op, const char* name, py::handle object, bool grouped = false);
};

// A weight ready for the kernels: a packed buffer as it is, or a plain [N, K] one packed for this call.
struct Weight {
  py::array memory;
  const int8_t* data() const { return static_cast<const int8_t*>(memory.data()); }
  Weight(const char* op, const char* name, py::handle object, int64_t N, int64_t K);
};

// A new packed buffer: int8 [bytes], 64-byte aligned.
py::array empty_packed(int64_t bytes);
// Throws unless `packed` is a 1-D, adjacent, aligned int8 buffer for an [N, K] weight.
void expect_packed(const Array& packed, int64_t N, int64_t K);

// "float32", np.float16, ml_dtypes.bfloat16, ... as ours; int8 where the op has it.
tt_dtype parse_out_dtype(const char* op, py::handle object, bool int8);
tt_activation parse_activation(const char* op, const std::string& name);

// Shape of `rows_of` with the last size replaced.
std::vector<py::ssize_t> shape_with_last(const Array& rows_of, int64_t last);

// The injected threads: the own pool, with as many as set_threads said (0: one per core).
tt_parallel own_pool();
// Runs a kernel without the GIL and turns its status into an exception. tt_last_error is the calling
// thread's, so taking the GIL back in between does not disturb it.
template <class Kernel>
void run(const Kernel& kernel) {
  const tt_parallel pool = own_pool();
  tt_status status;
  {
    const py::gil_scoped_release unlocked;
    status = kernel(&pool);
  }
  check_status(status);
}
void set_threads(int count);

// What int8_mm, int8_linear and int8_weight_mm share after the product: scale, bias, activation and the
// output, new or the caller's.
struct Epilogue {
  // out [shape]: None, or a writable array of that shape whose rows are adjacent elements. Its dtype
  // is `out_dtype`, by default that of `out`, by default `otherwise`. out_scale: [1] float32 for int8
  // out, else None; null for an op without int8 out.
  Epilogue(const char* op, const Scale& scale, py::handle bias, const std::string& activation,
           py::handle out_dtype, py::handle out, tt_dtype otherwise,
           const std::vector<py::ssize_t>& shape, py::handle out_scale = {});
  // Throws if the caller's out shares memory with what the kernel reads.
  void expect_no_alias(const char* name, const py::array& input) const;

  tt_epilogue values;
  py::object result;  // a new array, or the caller's object

 private:
  void take_bias(py::handle bias, int64_t N);
  void take_out_scale(py::handle out_scale);
  void take_out(const Array& array, const std::vector<py::ssize_t>& shape);

  const char* op_;
  py::array bias_, out_, out_scale_;
  bool callers_ = false;  // out_ is the caller's memory
};

// bitmap_linear and block_linear, in sparse.cpp.
void define_sparse(py::module_& m);

}  // namespace trimtab
