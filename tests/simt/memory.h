// The memory that kernels may touch: the tensors that a test registered, and a block's shared memory.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <vector>

#include "simt/fiber.h"

namespace simt {

// A tensor, exactly: one byte beyond it is a fault.
struct Range {
  uintptr_t begin, end;
  bool writable;
  std::vector<bool> written;  // by the running kernel, in pieces of 16 bytes
};

class Ranges {
 public:
  void add(const void* p, int64_t bytes, bool writable) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
    if (bytes <= 0) return;
    ranges_.push_back({begin, begin + uintptr_t(bytes), writable, {}});
    if (writable) ranges_.back().written.resize(size_t(bytes) / 16 + 2);
  }
  void clear() { ranges_.clear(), last_ = 0; }
  void start_kernel() {
    for (Range& r : ranges_) r.written.assign(r.written.size(), false);
  }

  // The range that holds all of the bytes, or null.
  Range* find(uintptr_t begin, size_t bytes) {
    const auto holds = [&](const Range& r) { return begin >= r.begin && begin + bytes <= r.end; };
    if (last_ < ranges_.size() && holds(ranges_[last_])) return &ranges_[last_];
    for (size_t i = 0; i < ranges_.size(); ++i)
      if (holds(ranges_[i])) return last_ = i, &ranges_[i];
    return nullptr;
  }
  // The range nearest to an address that no range holds, for the message.
  const Range* nearest(uintptr_t p) const {
    const Range* best = nullptr;
    const auto distance = [&](const Range& r) {
      return p < r.begin ? r.begin - p : p >= r.end ? p - r.end : 0;
    };
    for (const Range& r : ranges_)
      if (best == nullptr || distance(r) < distance(*best)) best = &r;
    return best;
  }

 private:
  std::vector<Range> ranges_;
  size_t last_ = 0;
};

// Shared memory of one block, aligned to 1024 bytes, an unmapped page after it. It starts as garbage,
// and so do the bytes between its end and that page, which no one may change.
class SharedMemory {
 public:
  static constexpr size_t kMost = 256 * 1024;

  SharedMemory() {
    void* p = mmap(nullptr, kMost + 4096, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::perror("simt: shared memory"), std::abort();
    mapped_ = static_cast<char*>(p);
  }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() {
    unpoison();
    munmap(mapped_, kMost + 4096);
  }

  char* start(size_t bytes, uint64_t pattern) {
    unpoison();
    if (protected_at_ != nullptr) mprotect(protected_at_, 4096, PROT_READ | PROT_WRITE);
    bytes_ = bytes, pattern_ = pattern;
    end_ = (bytes + 4095) / 4096 * 4096;
    protected_at_ = mapped_ + end_;
    mprotect(protected_at_, 4096, PROT_NONE);
    for (size_t i = 0; i < end_; i += 8) std::memcpy(mapped_ + i, &pattern, 8);
#if defined(SIMT_ASAN)
    __asan_poison_memory_region(mapped_ + bytes, end_ - bytes);
#endif
    return mapped_;
  }
  // Whether someone wrote beyond the end.
  bool overrun() {
    unpoison();
    for (size_t i = bytes_; i < end_; ++i)
      if (mapped_[i] != char(pattern_ >> (8 * (i % 8)))) return true;
    return false;
  }

 private:
  void unpoison() {
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(mapped_, end_);
#endif
  }

  char* mapped_ = nullptr;
  char* protected_at_ = nullptr;
  size_t bytes_ = 0, end_ = 0;
  uint64_t pattern_ = 0;
};

}  // namespace simt
