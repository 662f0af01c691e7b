// tt_own_pool: threads for callers that bring none (NumPy, plain C).
//
// One pool a process. A call opens the gate for its job, works on it too, closes the gate and waits
// for the workers that came in; one that is still waking up is not waited for. A call from inside a
// task, or while another thread has the pool, runs on its own thread alone.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <trimtab/trimtab.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace trimtab {
namespace {

// How long an idle worker looks for the next job before it sleeps: about what waking it up costs,
// so that layers called one after the other find it awake.
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int32_t kMaxThreads = 1024;

thread_local bool in_task = false;  // a worker, or a caller while its job runs

struct Job {
  tt_task task;
  void* ctx;
  int64_t n;
  alignas(64) std::atomic<int64_t> next{0};  // on its own line: every thread counts it up

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) task(ctx, i);
  }
};

class Pool {
 public:
  // False if another thread has the pool; the caller then runs its job alone.
  bool run(int32_t threads, int64_t n, tt_task task, void* ctx) {
    std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (!mine.owns_lock()) return false;
    const int32_t helpers = int32_t(n < threads ? n : threads) - 1;
    while (workers_ < helpers && start_worker()) ++workers_;

    // No worker is inside, so the job can be replaced; the store to gate_ publishes it.
    job_.task = task;
    job_.ctx = ctx;
    job_.n = n;
    job_.next.store(0, std::memory_order_relaxed);
    limit_.store(helpers, std::memory_order_relaxed);
    const uint64_t epoch = (gate_.load(std::memory_order_relaxed) & ~(kEpoch - 1)) + kEpoch;
    gate_.store(epoch | kOpen);
    wake(helpers);

    in_task = true;
    job_.work();
    in_task = false;
    close();
    return true;
  }

 private:
  // gate_: how many workers are inside (low 16 bits), whether more may come in, whether the caller
  // sleeps until the last has left, and above those the number of the job.
  static constexpr uint64_t kInside = 0xffff, kOpen = 1 << 16, kWaiting = 1 << 17, kEpoch = 1 << 18;

  bool start_worker() {
    // The workers take no signals: those are the program's own threads' business.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      started = false;  // no more threads to be had: fewer do the same work
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  void wake(int32_t helpers) {
    // A worker counts itself in sleeping_, then looks at gate_; this thread wrote gate_, then looks at
    // sleeping_. Both are sequentially consistent, so one of the two sees the other.
    if (sleeping_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int32_t i = 0; i < helpers; ++i) work_.notify_one();
  }

  // Lets no more workers in, and waits for those inside.
  void close() {
    if ((gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & kInside) == 0) return;
    const auto empty = [this] { return (gate_.load(std::memory_order_acquire) & kInside) == 0; };
    if (spin(empty)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    gate_.fetch_or(kWaiting);
    done_.wait(lock, empty);
  }

  void serve() {
    pthread_setname_np(pthread_self(), "trimtab");
    in_task = true;
    uint64_t seen = 0;
    const auto call = [&] {
      const uint64_t gate = gate_.load();
      return (gate & kOpen) && gate / kEpoch != seen;
    };
    for (;;) {
      if (!spin(call)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        work_.wait(lock, call);
        sleeping_.fetch_sub(1);
      }
      if (enter(&seen)) {
        job_.work();
        leave();
      }
    }
  }

  // Comes in if the gate is open and the job has room; notes in *seen which job it was.
  bool enter(uint64_t* seen) {
    uint64_t gate = gate_.load(std::memory_order_acquire);
    while ((gate & kOpen) && gate / kEpoch != *seen) {
      if (int64_t(gate & kInside) >= limit_.load(std::memory_order_relaxed)) {
        *seen = gate / kEpoch;
        return false;
      }
      if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) {
        *seen = gate / kEpoch;
        return true;
      }
    }
    return false;
  }

  void leave() {
    const uint64_t before = gate_.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kWaiting) == 0 || (before & kInside) != 1) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    done_.notify_one();
  }

  template <class F>
  static bool spin(const F& ready) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 16; ++i) {
        if (ready()) return true;
        _mm_pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  std::mutex busy_;  // held by the thread whose job runs
  Job job_;
  std::atomic<int32_t> limit_{0};  // workers the job has room for
  int32_t workers_ = 0;
  alignas(64) std::atomic<uint64_t> gate_{0};
  std::atomic<int32_t> sleeping_{0};
  std::mutex mutex_;
  std::condition_variable work_, done_;
};

// Never destroyed: its threads may still look at it while the process ends.
std::atomic<Pool*> the_pool{nullptr};

// A child of fork() has no workers, and locks in whatever state they were: it starts a new pool.
void forget_pool() { the_pool.store(nullptr); }

Pool* pool() {
  Pool* now = the_pool.load(std::memory_order_acquire);
  if (now != nullptr) return now;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* fresh = new (std::nothrow) Pool;
  if (the_pool.compare_exchange_strong(now, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;  // another thread was first; this one has no workers yet
  return now;
}

void run_on_pool(void* threads, int64_t n, tt_task task, void* ctx) {
  if (n > 1 && !in_task) {
    Pool* shared = pool();
    if (shared != nullptr &&
        shared->run(int32_t(reinterpret_cast<intptr_t>(threads)), n, task, ctx)) {
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i) task(ctx, i);
}

// The cores this process may use, which in a container or under taskset are fewer than the machine's.
int32_t available_cores() {
  cpu_set_t mask;
  const int count = sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask) : 0;
  if (count > 0) return count;
  const unsigned all = std::thread::hardware_concurrency();
  return all > 0 ? int32_t(all) : 1;
}

}  // namespace
}  // namespace trimtab

tt_parallel tt_own_pool(int32_t threads) {
  using namespace trimtab;
  if (threads <= 0) threads = available_cores();
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads == 1) return tt_parallel{nullptr, nullptr, 1};
  return tt_parallel{run_on_pool, reinterpret_cast<void*>(intptr_t(threads)), threads};
}
