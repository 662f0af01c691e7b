// CUDA's own vector types and the variables that tell a thread who it is.
#pragma once

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;  // of the running fiber; the scheduler sets them
inline dim3 blockDim, gridDim;     // of the launch
