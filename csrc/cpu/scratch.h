// Working memory that a calling thread keeps between calls, so that a call touches no fresh pages
// (4,096 page faults for 16 MiB cost more than quantizing into them).
#pragma once
#include <cstdint>

namespace trimtab {

// Buffers that live at the same time in one thread have different owners.
enum class Scratch { kProduct, kImages, kPatches, kOptim, kRow, kSparse, kTransposed, kCount };

// At least `bytes`, 64-byte aligned, valid until this thread's next call for the same owner; NULL if
// there is none.
void* thread_scratch(int64_t bytes, Scratch owner = Scratch::kProduct);

}  // namespace trimtab
