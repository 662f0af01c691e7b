// What sm_90 adds to a block and to a thread: the async view of shared memory, mbarriers, bulk stores and
// wgmma under way. Data alone; mbarrier.h, tma.h and wgmma.h say what happens to it.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "simt/core.h"
#include "simt/tensor_map.h"
#include "simt/warp.h"

namespace simt {

// --- mbarriers

struct Mbarrier {
  uint64_t word;  // what must stand in shared memory
  const Thread* unfenced;  // who initialised it, until his fence_mbarrier_init
  Where where;  // of mbarrier_init
  bool released = true;  // all arrivals of the running phase were cluster releases
  bool acquirable = false;  // those of the last phase were
  std::vector<Thread*> waiting = {};  // for the phase's end
};

// --- bulk stores

struct BulkStore {
  TensorMap map;
  uint32_t shared;
  int x, y;
  Where where;
  int64_t group;  // groups this thread had ended before it
  std::vector<char> bytes;  // rows of 128, once shared memory was read
};

// --- wgmma

// The sums of products that follow one another, from the first one's issue to the wait that covers the
// last one. Meanwhile the threads' own arrays hold garbage.
using SumWord = int32_t __attribute__((may_alias));  // the bits of a sum, int32 or float
struct Sums {
  int n;
  int32_t garbage;
  std::vector<int32_t> matrix;  // [64, n]
  std::array<SumWord*, kWarpgroup> array{};
};

// An operand: row r starts at address + r / 8 * stride + r % 8 * width, before the swizzle of that width.
struct Tile {
  uint32_t address, stride, width;
};

// Of wgmma.sp: how a sparse product reads its operands.
enum class ProductKind { dense_s8, sparse_s8, sparse_bf16, sparse_fp16 };

struct Product {
  uint64_t a_descriptor, b_descriptor;
  Tile a, b;
  bool add;
  ProductKind kind;
  int select;
  Where where;
  std::shared_ptr<Sums> sums;
  unsigned issued;  // threads of the warpgroup that have come to it
  bool early;  // done as soon as all have, and not at the wait
  std::array<uint32_t, kWarpgroup> metadata{};  // a word a thread
};

// Products of a warpgroup, numbered from the start of the kernel.
struct Warpgroup {
  std::deque<Product> products;
  int64_t first = 0;  // the number of products[0]
  int64_t done = 0;  // how many have been computed
  int registers = 0;  // a thread, by setmaxnreg; 0 before the first one
  std::vector<Thread*> waiting;  // for the others to issue their products
};

// Sums that a thread has in flight, and its last product that adds to them.
struct SumsInFlight {
  std::shared_ptr<Sums> sums;
  int64_t last;
};

// --- all of it

struct Sm90Block {
  std::vector<char> async_view;  // shared memory as the copy engine and wgmma see it
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<Warpgroup> warpgroups;
  size_t cluster_arrived = 0;  // threads at cluster_sync; kept by the cluster's first block
  uint64_t cluster_phase = 0;
};

struct Sm90Thread {
  std::deque<BulkStore> stores;  // in the order of issue
  int64_t store_groups = 0;  // ended
  int64_t stores_read = 0;  // groups whose reading half was waited for
  int64_t products = 0;  // issued
  std::vector<int64_t> product_groups;  // products issued before each group's end
  std::vector<SumsInFlight> sums;
  Where product_at;  // the last one
  bool acquired = false;  // may load from other blocks' shared memory
  bool fenced = false;  // wgmma_fence since the last wgmma_wait
};

inline void check_sm90_at_exit();

// Of the block; made at first use, and looked over when its threads exit. The async view starts as
// garbage.
inline Sm90Block& sm90(Block& block) {
  if (block.extension == nullptr) {
    auto made = std::make_shared<Sm90Block>();
    made->async_view.resize(size_t(block.shared_bytes));
    const uint64_t pattern = random_pattern();
    for (size_t i = 0; i < made->async_view.size(); ++i)
      made->async_view[i] = char(pattern >> (8 * (i % 8)));
    made->warpgroups.resize(block.threads.size() / kWarpgroup);
    block.extension = made;
    for (Thread* t : block.threads) t->at_exit.push_back(check_sm90_at_exit);
  }
  return *static_cast<Sm90Block*>(block.extension.get());
}

// Of the thread; made at first use.
inline Sm90Thread& sm90(Thread& thread) {
  if (thread.extension == nullptr) {
    sm90(*thread.block);
    thread.extension = std::make_shared<Sm90Thread>();
  }
  return *static_cast<Sm90Thread*>(thread.extension.get());
}

// Now and then the thread falls far behind: it sleeps until hardly anyone else can go on. So a warp that
// others must wait for, and do not, is overtaken by whole tiles.
struct Sleeper {
  Thread* thread;
  void operator()() const {
    // Others can go on, perhaps in circles until this one does; or all wait, most likely for copies.
    if (one_in(machine.runnable.empty() ? 16 : 4096)) return wake(thread);
    machine.work.push_back({*this, thread});
  }
};
inline void fall_behind(unsigned odds, Where where) {
  if (!one_in(odds)) return;
  machine.work.push_back({Sleeper{machine.running}, machine.running});
  wait("its turn (the simulator holds it back)", where);
}

// Whether asynchronous work that was just issued is done at once rather than at its wait.
inline bool done_early() {
  return machine.when == Policy::early || (machine.when == Policy::random && one_in(4));
}

}  // namespace simt
