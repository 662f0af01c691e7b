// What trimtab.optim calls by ctypes: the step on torch's threads, and a fast way from tensors to pointers.
// No schema: a step of 2000 tensors passes through no dispatcher, whose boxing costs 0.2 us a tensor.
#include <trimtab/adafactor.h>
#include <trimtab/optim_squares.h>

#include "adapter.h"

// The tensor at p.grad. TensorImpl::grad() is no part of torch's stable interface: where this symbol is
// missing (NULL, as it is weak), or does not pass the test that python/trimtab/optim/gather.py makes of it,
// the gradients come from Python, ten times slower.
extern "C" __attribute__((weak)) AtenTensorHandle
torch_grad_of(const void* tensor_impl) __asm__("_ZNK3c1010TensorImpl4gradEv");

// Counts the version of an at::Tensor up. As above.
extern "C" __attribute__((weak)) void torch_bump_version(const void* tensor) __asm__(
    "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE");

// Python's own, found in the interpreter that loads this library; NULL in another program.
extern "C" __attribute__((weak)) void* PyList_GetItem(void* list, intptr_t i);  // borrowed
extern "C" __attribute__((weak)) intptr_t PyList_Size(void* list);
extern "C" __attribute__((weak)) int PyDict_Next(void* dict, intptr_t* at, void** key,
                                                 void** value);

namespace trimtab {
namespace {

// tensors[i]: TensorImpl pointers (Tensor._cdata), 0 where there is none.
enum Slot {
  kOwner,
  kParam,
  kState,
  kEma = kState + TT_OPTIM_STATES,
  kCopy,
  kMask,
  kStep,
  kProduct,
  kScale,
  kMaster = kScale + TT_OPTIM_STATES,
  kSlots
};

enum Status : uint8_t {
  kReady,
  kNoGrad,
  kIrregular,  // the gradient's dtype, device, shape or strides are not the parameter's
  kNew,  // a first gradient: states are to be made
  kChanged,  // a parameter or state is not what it was
  kStatuses
};

}  // namespace

struct OptimGather {
  int64_t n;
  const void* const (*tensors)[kSlots];
  const void* const* grads;  // NULL: each owner's own
  const int64_t* layout;  // of tensor i from layout_at[i] on: dimensions, sizes, strides
  const int64_t* layout_at;
  const uint8_t* is_new;  // [n] has no state yet
  tt_optim_tensor* out;  // numel and dtypes filled in; receives pointers and the gradient's dtype
  uint8_t* status;  // [n]
  int32_t*
      device;  // [n] of the parameter when it was first looked at, as device_of says; before: -1
  int64_t counts[kStatuses];
  const int64_t (*lengths)[TT_OPTIM_STATES];  // [n] of states that have not numel; NULL: they have
};

namespace {

// An at::Tensor is one pointer to a TensorImpl, and a handle the address of an at::Tensor.
AtenTensorHandle handle(const void* const& tensor_impl) {
  return reinterpret_cast<AtenTensorHandle>(const_cast<const void**>(&tensor_impl));
}

// torch's numbers, which are behind function calls.
const struct Codes {
  int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16();
  int32_t f16 = aoti_torch_dtype_float16(), cpu = aoti_torch_device_type_cpu();
  int32_t strided = aoti_torch_layout_strided();
} codes;

// The tt_dtype, or -1.
int dtype_of(AtenTensorHandle tensor) {
  int32_t dtype = -1;
  aoti_torch_get_dtype(tensor, &dtype);
  if (dtype == codes.f32) return TT_F32;
  if (dtype == codes.bf16) return TT_BF16;
  return dtype == codes.f16 ? TT_F16 : -1;
}

// One number for a kind of device and an index.
int32_t device_of(AtenTensorHandle tensor) {
  int32_t kind = -1, index = 0;
  aoti_torch_get_device_type(tensor, &kind);
  if (kind != codes.cpu) aoti_torch_get_device_index(tensor, &index);
  return kind << 16 | (index & 0xffff);
}

bool is_dense_on(AtenTensorHandle tensor, int32_t device) {
  int32_t layout = -1;
  aoti_torch_get_layout(tensor, &layout);
  return layout == codes.strided && device_of(tensor) == device;
}

bool has_layout(AtenTensorHandle tensor, const int64_t* layout) {
  int64_t dim = -1, *sizes = nullptr, *strides = nullptr;
  aoti_torch_get_dim(tensor, &dim);
  if (dim != layout[0]) return false;
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != layout[1 + d]) return false;
    if (sizes[d] > 1 && strides[d] != layout[1 + dim + d]) return false;
  }
  return true;
}

// How many elements belong into a slot of a tensor of numel.
int64_t length(int slot, int64_t numel) {
  if (slot == kStep || slot == kProduct) return 1;
  if (slot < kScale || slot == kMaster) return numel;
  return (numel + TT_OPTIM_STATE_BLOCK - 1) / TT_OPTIM_STATE_BLOCK;
}

Status gather(const OptimGather& g, int64_t i) {
  const void* const* tensors = g.tensors[i];
  const int64_t* layout = g.layout + g.layout_at[i];
  tt_optim_tensor& out = g.out[i];
  out.grad = nullptr;
  AtenTensorHandle grad = nullptr;
  if (g.grads == nullptr) {
    grad = torch_grad_of(tensors[kOwner]);
    bool defined = false;
    aoti_torch_is_defined(grad, &defined);
    if (!defined) return kNoGrad;
  } else {
    if (g.grads[i] == nullptr) return kNoGrad;
    grad = handle(g.grads[i]);
  }
  if (g.is_new[i]) return kNew;
  // Where a pointer is that of the step before, the tensor still has its dtype, device and length.
  const AtenTensorHandle param = handle(tensors[kParam]);
  void* now = nullptr;
  if (!has_layout(param, layout)) return kChanged;
  aoti_torch_get_data_ptr(param, &now);
  int32_t& device = g.device[i];
  if (device < 0) device = device_of(param);
  if (now != out.param && (!is_dense_on(param, device) || dtype_of(param) != out.param_dtype))
    return kChanged;
  out.param = now;
  void** const pointers = &out.param;  // those of the slots follow each other from state on
  static_assert(offsetof(tt_optim_tensor, master) == kMaster * sizeof(void*), "");
  for (int slot = kState; slot < kSlots; ++slot) {
    if (tensors[slot] == nullptr) continue;
    aoti_torch_get_data_ptr(handle(tensors[slot]), &now);
    if (now == pointers[slot]) continue;
    int64_t numel = -1;
    aoti_torch_get_numel(handle(tensors[slot]), &numel);
    const bool own = g.lengths && slot >= kState && slot < kState + TT_OPTIM_STATES;
    const int64_t right = own ? g.lengths[i][slot - kState] : length(slot, out.numel);
    if (numel != right || device_of(handle(tensors[slot])) != device) return kChanged;
    pointers[slot] = now;
  }
  const int dtype = dtype_of(grad);
  if (dtype < 0 || !is_dense_on(grad, device) || !has_layout(grad, layout)) return kIrregular;
  out.grad_dtype = uint8_t(dtype);
  aoti_torch_get_data_ptr(grad, &out.grad);
  static float none;
  if (out.numel == 0) out.grad = &none;  // NULL would mean that there is no gradient
  return kReady;
}

}  // namespace
}  // namespace trimtab

extern "C" {

TT_API int32_t trimtab_optim_reads_grad() { return torch_grad_of != nullptr; }

// Fills g->out, g->status and g->counts. The caller holds the GIL.
TT_API void trimtab_optim_gather(trimtab::OptimGather* g) {
  for (int64_t& count : g->counts) count = 0;
  for (int64_t i = 0; i < g->n; ++i) ++g->counts[g->status[i] = trimtab::gather(*g, i)];
}

// Counts up the versions of n tensors, which autograd looks at; 0: it can't, or not of all.
TT_API int32_t trimtab_optim_bump_versions(const void* const* tensors, int64_t n) {
  using namespace trimtab;
  if (torch_bump_version == nullptr) return 0;
  try {
    for (int64_t i = 0; i < n; ++i) torch_bump_version(&tensors[i]);
  } catch (...) {  // an inference tensor has none
    return 0;
  }
  return 1;
}

TT_API int32_t trimtab_optim_reads_objects() {
  return PyList_GetItem != nullptr && PyList_Size != nullptr && PyDict_Next != nullptr;
}

// Whether two lists hold the same objects. The caller holds the GIL, here and below.
TT_API int32_t trimtab_optim_same(void* left, void* right) {
  const intptr_t n = PyList_Size(left);
  if (n != PyList_Size(right)) return 0;
  for (intptr_t i = 0; i < n; ++i)
    if (PyList_GetItem(left, i) != PyList_GetItem(right, i)) return 0;
  return 1;
}

// Whether the values of a dict's dicts, one after the other, are the objects of a list.
TT_API int32_t trimtab_optim_same_values(void* dicts, void* values) {
  const intptr_t count = PyList_Size(values);
  intptr_t k = 0, outer = 0;
  for (void *owner, *dict; PyDict_Next(dicts, &outer, &owner, &dict);) {
    intptr_t inner = 0;
    for (void *key, *value; PyDict_Next(dict, &inner, &key, &value); ++k)
      if (k >= count || PyList_GetItem(values, k) != value) return 0;
  }
  return k == count;
}

// tt_optim_step on torch's threads.
TT_API int32_t trimtab_optim_step(const tt_optim_call* call) {
  const tt_parallel pool = trimtab::torch_pool();
  return tt_optim_step(call, &pool);
}

TT_API int32_t trimtab_optim_squares(const tt_optim_call* call, double* squares) {
  const tt_parallel pool = trimtab::torch_pool();
  return tt_optim_squares(call, squares, &pool);
}

TT_API int32_t trimtab_optim_step_by(const tt_optim_call* call, const double* squares) {
  const tt_parallel pool = trimtab::torch_pool();
  return tt_optim_step_by(call, squares, &pool);
}

TT_API int32_t trimtab_adafactor_step(const tt_adafactor_call* call) {
  const tt_parallel pool = trimtab::torch_pool();
  return tt_adafactor_step(call, &pool);
}
}
