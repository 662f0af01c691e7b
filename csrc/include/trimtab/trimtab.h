/* trimtab: the C interface every front end stands on. No torch, no C++ types.
 *
 * Every function returns a tt_status. On anything but TT_OK nothing was written to the outputs, and
 * tt_last_error() holds one sentence that names the op, what was expected and what came.
 */
#ifndef TRIMTAB_TRIMTAB_H_
#define TRIMTAB_TRIMTAB_H_

#include <stdint.h>

#define TT_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one whenever a struct or a function below changes its meaning. */
#define TT_ABI_VERSION 2

typedef enum tt_status {
  TT_OK = 0,
  TT_INVALID_ARGUMENT = 1, /* a bad value: dtype, size, pointer, scale */
  TT_UNSUPPORTED = 2,      /* this CPU or build cannot do it */
  TT_OUT_OF_MEMORY = 3,    /* no memory for scratch space */
  TT_CUDA_ERROR = 4,       /* the CUDA runtime or driver refused; the message has its words */
} tt_status;

/* TT_I8 only as the out_dtype of int8_mm and int8_linear. */
typedef enum tt_dtype { TT_F32 = 0, TT_BF16 = 1, TT_F16 = 2, TT_I8 = 3 } tt_dtype;

/* Same numbers as trimtab::Activation in math/activation.h. */
typedef enum tt_activation {
  TT_ACT_NONE = 0,
  TT_ACT_RELU = 1,
  TT_ACT_GELU = 2,
  TT_ACT_GELU_TANH = 3,
  TT_ACT_SILU = 4,
} tt_activation;

/* Instruction sets in rising order. A CPU that has one is not assumed to have those below it. */
typedef enum tt_isa {
  TT_ISA_SCALAR = 0,  /* any CPU */
  TT_ISA_AVX2 = 1,    /* AVX2, FMA, F16C */
  TT_ISA_AVXVNNI = 2, /* AVX2 and the 256-bit AVX-VNNI dot product */
  TT_ISA_AVX512 = 3,  /* AVX-512 F, BW, DQ, VL, VNNI */
  TT_ISA_AMX = 4,     /* AVX-512 as above and AMX-TILE, AMX-INT8 */
} tt_isa;

/* Runs task(ctx, i) for i in [0, n), in any order and on any threads, and returns when all are done.
 * The caller injects it, so that trimtab never brings a second thread pool into a process. */
typedef void (*tt_task)(void* ctx, int64_t i);
typedef struct tt_parallel {
  void (*run)(void* pool, int64_t n, tt_task task, void* ctx); /* NULL: the calling thread only */
  void* pool;                                                  /* handed to run */
  int32_t threads;                                             /* how many run() can use; >= 1 */
} tt_parallel;

/* A cudaStream_t; NULL is the default stream. Functions that end in _cuda live in libtrimtab_cuda.so: they
 * take device pointers of the current device, enqueue on the stream, do not wait and allocate nothing. */
typedef void* tt_stream;

/* TT_OK if the current device is a GPU that the _cuda functions run on: compute capability 8.0 or later. */
TT_API tt_status tt_supported_cuda(void);

TT_API int32_t tt_abi_version(void);

/* The last failure on this thread; "" before the first. Valid until the next failure on it. */
TT_API const char* tt_last_error(void);
/* Makes a copy of the message this thread's tt_last_error, as libtrimtab_cuda.so does for its own. */
TT_API void tt_set_last_error(const char* message);

/* The instruction set in use: the best this CPU has, capped by TRIMTAB_ISA (read once) or
 * tt_set_isa. Unknown names and sets this CPU lacks are TT_INVALID_ARGUMENT / TT_UNSUPPORTED. */
TT_API tt_status tt_get_isa(tt_isa* isa);
/* "scalar", "avx2", "avxvnni", "avx512", "amx"; "" or NULL: back to the environment's choice. */
TT_API tt_status tt_set_isa(const char* name);
TT_API const char* tt_isa_name(tt_isa isa);
/* Non-zero if this CPU and operating system can run it. */
TT_API int32_t tt_isa_available(tt_isa isa);

/* trimtab's own small pool, for callers that have none (NumPy, plain C). Threads start on first use;
 * threads <= 0 means one per available core. */
TT_API tt_parallel tt_own_pool(int32_t threads);

#ifdef __cplusplus
}
#endif
#endif /* TRIMTAB_TRIMTAB_H_ */
