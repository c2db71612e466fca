// Work shared among threads: those that torch keeps, or new ones.
#pragma once
#include <cstdint>
#include <functional>

namespace rwn::cpu {

// Calls task(i, thread) for each i < count, with thread < threads; returns when all is done. Where nobody is kept from
// his share, a thread has the same i, that follow each other, whenever threads and count are the same.
void run(int threads, int64_t count, const std::function<void(int64_t i, int thread)>& task);

}  // namespace rwn::cpu
