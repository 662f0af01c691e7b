/* tt_own_pool: every index runs exactly once, whatever the sizes, from sleeping threads, from inside a
 * task, from several threads at once and in a child of fork(). Returns 0 only if all of that holds.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/wait.h>
#include <time.h>
#include <trimtab/trimtab.h>
#include <unistd.h>

enum { MOST = 300 };

typedef struct Counts {
  atomic_int hits[MOST];
  tt_parallel pool;
  int inner; /* indices that each task runs in turn */
  int slow;
} Counts;

static void task(void* ctx, int64_t i) {
  Counts* counts = ctx;
  if (counts->inner == 0) {
    /* Every third is slow, so that a pool which does not wait for all is found out. */
    const struct timespec slow = {0, 100000};
    if (counts->slow && i % 3 == 1) nanosleep(&slow, NULL);
    atomic_fetch_add(&counts->hits[i], 1);
  } else {
    Counts* nested = counts + 1;
    counts->pool.run(counts->pool.pool, counts->inner, task, nested);
  }
}

/* Runs n tasks; how many of MOST indices were not hit once, or hit although n or above. */
static int wrong(const tt_parallel* pool, int n, int slow) {
  static _Thread_local Counts counts[1];
  int bad = 0, i;
  for (i = 0; i < MOST; ++i) atomic_store(&counts->hits[i], 0);
  counts->pool = *pool;
  counts->slow = slow;
  pool->run(pool->pool, n, task, counts);
  for (i = 0; i < MOST; ++i) bad += atomic_load(&counts->hits[i]) != (i < n);
  return bad;
}

static int wrong_nested(const tt_parallel* pool, int n, int inner) {
  static Counts counts[2];
  int bad = 0, i;
  counts[0].pool = *pool;
  counts[0].inner = inner;
  for (i = 0; i < MOST; ++i) atomic_store(&counts[1].hits[i], 0);
  pool->run(pool->pool, n, task, counts);
  for (i = 0; i < MOST; ++i) bad += atomic_load(&counts[1].hits[i]) != (i < inner ? n : 0);
  return bad;
}

static void* many(void* pool) {
  long bad = 0;
  int i;
  for (i = 0; i < 300; ++i) bad += wrong(pool, i % 50, 0);
  return (void*)bad;
}

static int wrong_at_once(tt_parallel* pool) {
  pthread_t threads[4];
  int bad = 0, i;
  for (i = 0; i < 4; ++i) bad += pthread_create(&threads[i], NULL, many, pool) != 0;
  for (i = 0; i < 4; ++i) {
    void* result = NULL;
    pthread_join(threads[i], &result);
    bad += (int)(long)result;
  }
  return bad;
}

static int wrong_in_child(const tt_parallel* pool) {
  int status = 0;
  const pid_t child = fork();
  if (child == 0) {
    alarm(30); /* a child that waits for threads it does not have ends here */
    _exit(wrong(pool, 100, 0) != 0);
  }
  return child < 0 || waitpid(child, &status, 0) != child || status != 0;
}

int main(void) {
  const struct timespec longer_than_they_spin = {0, 2000000};
  const int widths[] = {2, 3, 8, 40};
  int failures = tt_own_pool(0).threads < 1 || tt_own_pool(1).run != NULL;
  size_t w;
  for (w = 0; w < sizeof widths / sizeof widths[0]; ++w) {
    tt_parallel pool = tt_own_pool(widths[w]);
    int bad[5] = {0}, i;
    for (i = 0; i < MOST; ++i) bad[0] += wrong(&pool, i, 0);
    for (i = 0; i < 10; ++i) {
      nanosleep(&longer_than_they_spin, NULL);
      bad[1] += wrong(&pool, 7, 1);
    }
    bad[2] = wrong_nested(&pool, 9, 20);
    bad[3] = wrong_at_once(&pool);
    bad[4] = wrong_in_child(&pool) + wrong(&pool, MOST, 0);
    printf("%d threads: wrong %d, asleep %d, nested %d, at once %d, child %d\n", (int)pool.threads,
           bad[0], bad[1], bad[2], bad[3], bad[4]);
    for (i = 0; i < 5; ++i) failures += bad[i];
  }
  puts(failures == 0 ? "all as expected" : "FAILED");
  return failures != 0;
}
