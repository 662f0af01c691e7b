#include "cpu/scratch.h"

#include <sys/mman.h>

#include <cstdlib>

namespace trimtab {
namespace {

// What a thread keeps; a larger request is met, and given back at the next smaller one.
constexpr int64_t kKept = int64_t(24) << 20;
constexpr int64_t kHugePage = int64_t(2) << 20;

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[int(Scratch::kCount)];

}  // namespace

void* thread_scratch(int64_t bytes, Scratch owner) {
  Buffer& buffer = buffers[int(owner)];
  if (bytes < 1) bytes = 1;  // a thread's first request too: NULL says that there is no memory
  const bool oversized = buffer.size > kKept && bytes <= kKept;
  if (bytes > buffer.size || oversized) {
    // Large buffers in 2 MiB pages: 512 times fewer page faults and TLB entries.
    const int64_t page = bytes >= kHugePage ? kHugePage : 4096;
    const int64_t size = (bytes + page - 1) / page * page;
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(size_t(page), size_t(size));
    buffer.size = buffer.data != nullptr ? size : 0;
    if (buffer.data != nullptr && page == kHugePage)
      madvise(buffer.data, size_t(size), MADV_HUGEPAGE);
  }
  return buffer.data;
}

}  // namespace trimtab
