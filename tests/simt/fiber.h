// Fibers: many stacks, one thread of the operating system, switches of a few nanoseconds. x86-64 only.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(SIMT_ASAN)
constexpr size_t kStackBytes = 256 * 1024;  // red zones around every local
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;
constexpr size_t kPoisonedBytes = 8192;  // of the top of a stack before its fiber starts

// A suspended computation. For the thread that runs the scheduler, `bottom` is filled by its first switch.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // the address sanitizer's
};

// Saves the callee-saved registers and the stack pointer, and takes those that `to` was left with. The
// control words of SSE and x87 are the same in all fibers, so they stay.
__attribute__((naked, noipa)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

// Goes on in `to`; returns when someone switches back to `from`. dying: no one will.
inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool dying = false) {
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.fake_stack, to.bottom, to.bytes);
#endif
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To be called first on a new stack, so that the sanitizer learns where the scheduler's stack lies.
inline void entered([[maybe_unused]] Fiber& scheduler) {
#if defined(SIMT_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (scheduler.bottom == nullptr) scheduler.bottom = bottom, scheduler.bytes = bytes;
#endif
}

// A stack with an unmapped page below it, kept for the life of the process.
inline char* new_stack() {
  void* p = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p, kGuardBytes, PROT_NONE) != 0) {
    std::perror("simt: a stack");
    std::abort();
  }
  return static_cast<char*>(p) + kGuardBytes;
}

// Makes the fiber start in entry() on that stack when it is switched to. The top of the stack and the
// registers hold the pattern: a local that no one set is garbage. `color` moves the top by whole cache
// lines, for otherwise the same local of all fibers would lie in one set of the cache.
inline void prepare_fiber(Fiber& fiber, char* stack, unsigned color, uint64_t pattern,
                          void (*entry)()) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  uint64_t* top = reinterpret_cast<uint64_t*>(stack + kStackBytes - 64 * (1 + color % 64));
  for (uint64_t* p = top - kPoisonedBytes / 8; p < top; ++p) *p = pattern;
  *--top = 0;  // entry's return address; there its stack pointer is 8 beyond a multiple of 16
  *--top = reinterpret_cast<uint64_t>(entry);
  top -= 6;  // the registers that switch_stacks pops
  fiber = {top, stack, kStackBytes, nullptr};
}

}  // namespace simt
