// Work shared among threads: those that torch keeps, or new ones.
#pragma once
#include <cstdint>
#include <functional>

namespace rwn::cpu {

// Calls work(i, thread) for each i < count, with thread < threads; returns when all is done.
void run(int threads, int64_t count, const std::function<void(int64_t i, int thread)>& work);

}  // namespace rwn::cpu
