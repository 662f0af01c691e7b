#include "cpu/scratch.h"

#include <cstdlib>

namespace trimtab {
namespace {

// What a thread keeps; a larger request is met, and given back at the next smaller one.
constexpr int64_t kKept = int64_t(24) << 20;

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[int(Scratch::kCount)];

}  // namespace

void* thread_scratch(int64_t bytes, Scratch owner) {
  Buffer& buffer = buffers[int(owner)];
  const bool oversized = buffer.size > kKept && bytes <= kKept;
  if (bytes > buffer.size || oversized) {
    const int64_t size = (bytes + 4095) / 4096 * 4096;
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(4096, size_t(size));
    buffer.size = buffer.data != nullptr ? size : 0;
  }
  return buffer.data;
}

}  // namespace trimtab
