// Working memory that a calling thread keeps between calls, so that a call touches no fresh pages
// (4,096 page faults for 16 MiB cost more than quantizing into them).
#pragma once
#include <cstdint>

namespace trimtab {

// At least `bytes`, 64-byte aligned, valid until this thread's next call; NULL if there is none.
void* thread_scratch(int64_t bytes);

}  // namespace trimtab
