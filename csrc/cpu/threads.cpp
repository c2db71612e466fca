// torch's threads are those of an OpenMP library, which wait busily for more work: threads of our own would compete
// with them. So the library that is already in the process is used, through the entry that code compiled by gcc calls.
#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace rwn::cpu {
namespace {

// A thread's part of the items, on a cache line of its own.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Share {
  const std::function<void(int64_t, int)>& work;
  std::vector<Range> ranges;
};

// What a thread does: its own range, then what is left of the others'. From call to call it so finds in its caches what
// it left there, and nobody waits for one who is kept from his.
void work(Share& share, int thread) {
  const int threads = int(share.ranges.size());
  for (int k = 0; k < threads; ++k) {
    Range& range = share.ranges[(thread + k) % threads];
    for (int64_t i = range.next++; i < range.end; i = range.next++) share.work(i, thread);
  }
}

using ThreadNumber = int (*)();
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Parallel openmp() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

ThreadNumber thread_number() {
  static const auto found = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  return found;
}

void work_as_numbered(void* share) { work(*static_cast<Share*>(share), thread_number()()); }

}  // namespace

void run(int threads, int64_t count, const std::function<void(int64_t, int)>& task) {
  threads = int(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  Share share{task, std::vector<Range>(threads)};
  for (int t = 0; t < threads; ++t) {
    share.ranges[t].next = count * t / threads;
    share.ranges[t].end = count * (t + 1) / threads;
  }
  if (const Parallel parallel = openmp(); parallel && thread_number()) {
    parallel(work_as_numbered, &share, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(work, std::ref(share), t);
    work(share, 0);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace rwn::cpu
