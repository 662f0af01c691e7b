/* A linear layer from C: pack the weight once, then one call a batch. Then what errors look like.
 *
 * Prints the layer's output and each error, and returns 0 only if all of them are as expected.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <trimtab/int8_linear.h>
#include <trimtab/int8_pack.h>
#include <trimtab/int8_weight_mm.h>
#include <trimtab/quantize_int8.h>

enum { M = 2, N = 3, K = 5 };

static int failures = 0;

/* Counts a failure unless `status` is `expected` and the message holds `part`. */
static void expect(const char* what, tt_status status, tt_status expected, const char* part) {
  const char* message = status == TT_OK ? "" : tt_last_error();
  printf("%s: status %d %s\n", what, (int)status, message);
  if (status != expected || strstr(message, part) == NULL) {
    printf("  expected status %d and a message with \"%s\"\n", (int)expected, part);
    ++failures;
  }
}

static void run_layer(const int8_t* packed, const tt_parallel* pool) {
  /* The largest magnitude of a row is 127, so its scale is 1 and the result can be told in advance. */
  const float x[M][K] = {{127, 1, -2, 0, 5}, {-3, 127, 0, 4, -1}};
  const float weight_scale[N] = {1, 0.5f, 2}, bias[N] = {0, 10, -1};
  const float expected[M][N] = {{127 - 5, 0.5f * 5 + 10, 0}, {0, 0.5f * 127 + 10, 2 * 8 - 1}};
  float out[M][N];
  const tt_epilogue epilogue = {weight_scale, bias, TT_F32, TT_ACT_RELU, out, N, TT_F32, NULL};
  int m, n;

  expect("int8_linear", tt_int8_linear(x, TT_F32, K, packed, M, N, K, &epilogue, pool), TT_OK, "");
  for (m = 0; m < M; ++m) {
    for (n = 0; n < N; ++n) {
      printf("  out[%d][%d] = %g\n", m, n, (double)out[m][n]);
      if (out[m][n] != expected[m][n]) {
        printf("  expected %g\n", (double)expected[m][n]);
        ++failures;
      }
    }
  }
}

static void show_errors(int8_t* packed, const tt_parallel* pool) {
  float x[K] = {0}, scale[N] = {1, 1, 1}, out[N] = {42, 42, 42};
  int8_t q[K];
  tt_epilogue epilogue = {scale, NULL, TT_F32, TT_ACT_NONE, out, N, TT_F32, NULL};
  tt_isa isa;

  expect("wrong dtype", tt_quantize_int8(x, (tt_dtype)9, K, 1, K, q, K, scale, pool),
         TT_INVALID_ARGUMENT, "quantize_int8: expected");
  expect("negative size", tt_int8_pack(q, K, -1, K, packed, pool), TT_INVALID_ARGUMENT,
         "int8_pack: expected sizes >= 0, got N=-1");
  expect("misaligned", tt_int8_pack(q, K, 1, K, packed + 1, pool), TT_INVALID_ARGUMENT,
         "int8_pack: expected packed aligned to 64 bytes");
  expect("K too large",
         tt_int8_linear(x, TT_F32, K, packed, 1, N, TT_INT8_MAX_K + 1, &epilogue, pool),
         TT_INVALID_ARGUMENT, "int8_linear: expected K <= 133144");
  expect("no epilogue", tt_int8_linear(x, TT_F32, K, packed, 1, N, K, NULL, pool),
         TT_INVALID_ARGUMENT, "int8_linear: epilogue is NULL");
  epilogue.activation = (tt_activation)77;
  expect("no such activation", tt_int8_linear(x, TT_F32, K, packed, 1, N, K, &epilogue, pool),
         TT_INVALID_ARGUMENT, "int8_linear: unknown activation 77");
  epilogue.activation = TT_ACT_NONE;
  epilogue.out_dtype = TT_I8;
  expect("int8 out without its scale",
         tt_int8_linear(x, TT_F32, K, packed, 1, N, K, &epilogue, pool), TT_INVALID_ARGUMENT,
         "int8_linear: expected out_scale for int8 out, got NULL");
  epilogue.out_dtype = TT_F32;
  epilogue.out_scale = scale;
  expect("float out with a scale", tt_int8_linear(x, TT_F32, K, packed, 1, N, K, &epilogue, pool),
         TT_INVALID_ARGUMENT, "int8_linear: expected out_scale NULL where out is not int8");
  epilogue.out_dtype = TT_I8;
  expect("an op without int8 out",
         tt_int8_weight_mm(x, TT_F32, K, packed, K, NULL, 1, N, K, &epilogue, pool),
         TT_INVALID_ARGUMENT,
         "int8_weight_mm: expected out of float32, bfloat16 or float16, got int8");
  expect("no such instruction set", tt_set_isa("mmx"), TT_INVALID_ARGUMENT, "got \"mmx\"");
  if (out[0] != 42 || out[N - 1] != 42) {
    puts("  an output was written in spite of the error");
    ++failures;
  }
  if (tt_get_isa(&isa) == TT_OK) printf("instruction set: %s\n", tt_isa_name(isa));
}

int main(void) {
  const int8_t weight[N][K] = {{1, 0, 0, 0, -1}, {0, 1, -2, 0, 0}, {-2, 0, 0, 0, -2}};
  const size_t bytes = (size_t)tt_int8_packed_size(N, K);
  /* aligned_alloc wants a multiple of the alignment. */
  const size_t rounded = (bytes + TT_INT8_PACK_ALIGNMENT - 1) / TT_INT8_PACK_ALIGNMENT * 64;
  int8_t* packed = aligned_alloc(TT_INT8_PACK_ALIGNMENT, rounded);
  const tt_parallel pool = tt_own_pool(0);

  if (packed == NULL || tt_abi_version() != TT_ABI_VERSION) return 1;
  printf("threads: %d\n", (int)pool.threads);
  expect("int8_pack", tt_int8_pack(&weight[0][0], K, N, K, packed, &pool), TT_OK, "");
  run_layer(packed, &pool);
  run_layer(packed, NULL); /* on this thread alone */
  show_errors(packed, &pool);
  free(packed);
  puts(failures == 0 ? "all as expected" : "FAILED");
  return failures != 0;
}
