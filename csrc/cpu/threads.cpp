// torch's threads are those of an OpenMP library, which wait busily for more work: threads of our own would compete
// with them. So the library that is already in the process is used, through the entry that code compiled by gcc calls.
#include "threads.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace rwn::cpu {
namespace {

struct Share {
  const std::function<void(int64_t, int)>& work;
  const int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};
};

// What each thread does: the next item, until there is none.
void take(void* data) {
  Share& share = *static_cast<Share*>(data);
  const int thread = share.threads++;
  for (int64_t i = share.next++; i < share.count; i = share.next++) share.work(i, thread);
}

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

Parallel openmp() {
  static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void run(int threads, int64_t count, const std::function<void(int64_t, int)>& work) {
  Share share{work, count};
  threads = int(std::min<int64_t>(threads, count));
  if (threads <= 1) {
    take(&share);
  } else if (const Parallel parallel = openmp()) {
    parallel(take, &share, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(take, &share);
    take(&share);
    for (std::thread& other : others) other.join();
  }
}

}  // namespace rwn::cpu
