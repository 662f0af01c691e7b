// Working memory that a calling thread keeps between calls, so that a call touches no fresh pages
// (4,096 page faults for 16 MiB cost more than quantizing into them).
#pragma once
#include <cstdint>

namespace trimtab {

// Buffers that live at the same time in one thread have different owners.
enum class Scratch {
  kProduct,
  kImages,
  kPatches,
  kOptim,
  kRow,
  kSparse,
  kTransposed,
  kTable,
  kFactors,
  kCount
};

// At least `bytes`, 64-byte aligned, valid until this thread's next call for the same owner; NULL if
// there is no memory, and for 0 bytes not otherwise.
void* thread_scratch(int64_t bytes, Scratch owner = Scratch::kProduct);

// Cuts memory into arrays, each aligned to 64 bytes; of an empty one it measures what they need, which take()
// then gets, to be cut in the same way.
struct Carver {
  char* at = nullptr;

  template <class T>
  void operator()(T*& array, int64_t count) {
    at = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at) + 63) & ~uintptr_t(63));
    array = reinterpret_cast<T*>(at);
    at += count * int64_t(sizeof(T));
  }
  bool take(Scratch owner) {
    at = static_cast<char*>(thread_scratch(int64_t(reinterpret_cast<uintptr_t>(at)), owner));
    return at != nullptr;
  }
};

}  // namespace trimtab
