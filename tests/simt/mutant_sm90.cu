// int8_mm_sm90.cuh by itself, with the tile and cluster given: what tests/test_simt_sm90.py calls, and
// mutates.
#include "cuda/int8_mm_sm90.cuh"

extern "C" {

// Float32 out, no bias or activation. Strides are K rounded up to 16 for a and b, N for out.
TT_API tt_status simt_int8_mm_sm90(const int8_t* a, const float* a_scale, const int8_t* b,
                                   const float* b_scale, float* out, int M, int N, int K, int wide,
                                   int swapped, int split, int cluster, int sm_count) {
  using namespace trimtab;
  Int8MmArgs args = {};
  args.a = a, args.a_scale = a_scale, args.b = b;
  args.a_stride = args.b_stride = (K + 15) / 16 * 16;
  args.M = M, args.N = N, args.K = K;
  args.epilogue.b_scale = b_scale;
  args.epilogue.out = out;
  args.epilogue.out_stride = N;
  args.epilogue.out_dtype = TT_F32;
  for (const Sm90Kind& kind : kSm90Kinds) {
    if (kind.wide != wide || kind.swapped != (swapped != 0) || kind.split != (split != 0)) continue;
    const Sm90Plan plan = sm90_plan_of(M, N, K, sm_count, kind, cluster, 14);
    return launch_int8_mm_sm90("int8_mm", args, plan, nullptr);
  }
  return TT_INVALID_ARGUMENT;
}

// The kernels there are, from 0: wide, swapped, split, least and most cluster. 0 beyond the last.
TT_API int simt_int8_mm_sm90_kind(int number, int32_t* fields) {
  using namespace trimtab;
  if (number >= int(sizeof kSm90Kinds / sizeof kSm90Kinds[0])) return 0;
  const Sm90Kind& kind = kSm90Kinds[number];
  fields[0] = kind.wide, fields[1] = kind.swapped, fields[2] = kind.split;
  fields[3] = kind.least_cluster, fields[4] = kind.most_cluster;
  return 1;
}
}
