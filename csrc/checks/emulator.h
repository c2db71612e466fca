// Runs a kernel's own source on a CPU: every CUDA thread is a fiber, all blocks are resident at once.
//
// What it models pessimistically: asynchronous copies land as late as they may (when they are waited for), shared
// memory begins as NaN, blocks run in any chosen order. What it takes on trust: the register and memory layouts of
// ldmatrix, mma and wgmma, here written down from NVIDIA's PTX manual.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "../numbers.h"

#define RWN_DEVICE inline
#define RWN_KERNEL
#define RWN_BOUNDS(threads, blocks)
#define RWN_ARGUMENT const
#define __syncthreads() ::rwn::emulator::block_barrier()
#define __threadfence() (void)0
#define threadIdx (::rwn::emulator::self().index)
#define blockIdx (::rwn::emulator::self().block->index)
#define blockDim (::rwn::emulator::self().block->size)

struct float4 {
  float x, y, z, w;
};

namespace rwn {

using std::max;
using std::min;

namespace emulator {

struct Index {
  int x = 0, y = 0, z = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

// A tensor as the copy engine sees it: pixels of `channels` 16-bit values.
struct TensorMap {
  const uint16_t* base;
  int channels, pixels;
  int64_t pixel_stride;
};
struct Box {
  char* to;
  TensorMap map;
  int channel, pixel;
};
struct Arrival {  // an mbarrier
  int phase = 0, announced = 0;
  std::vector<Box> boxes;
};

struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  const void* rows[32];
  uint32_t a[32][4], b[32][2];
};

struct Block {
  Index index, size;
  std::vector<char> raw;
  char* shared;
  int arrived = 0;
  unsigned generation = 0;
  std::vector<Warp> warps;
  std::map<uint64_t*, Arrival> arrivals;
};

struct Thread {
  Index index;
  Block* block;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false, waiting = false;  // for other warps
  std::deque<std::vector<Copy>> groups{1};
  std::vector<std::function<void()>> products;
};

inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline Thread& self() { return *current; }
inline void yield() { swapcontext(&current->context, &scheduler); }
// Until another warp does something.
inline void wait() {
  current->waiting = true;
  yield();
}

inline void wait_for_all(int& arrived, unsigned& generation, int count, void (*rest)()) {
  const unsigned mine = generation;
  if (++arrived == count) {
    arrived = 0;
    ++generation;
  }
  while (generation == mine) rest();
}
inline void block_barrier() {
  Block& block = *self().block;
  wait_for_all(block.arrived, block.generation, block.size.x, wait);
}
inline Warp& warp() { return self().block->warps[self().index.x / 32]; }
inline int lane() { return self().index.x % 32; }
inline void warp_barrier() { wait_for_all(warp().arrived, warp().generation, 32, yield); }

inline void enter() {
  body();
  current->done = true;
  yield();
}

// Runs kernel(task) on blocks_x * blocks_y blocks. All warps go at one pace; `backwards`, each in turn runs as far ahead of
// the others as barriers let it, the last block's last warp first.
template <class Kernel, class Task>
void launch(Kernel kernel, const Task& task, int blocks_x, int blocks_y, int threads, int shared_bytes, bool backwards) {
  constexpr int kStack = 96 * 1024;
  body = [&] { kernel(task); };
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> all;
  for (int i = 0; i < blocks_x * blocks_y; ++i) {
    auto block = std::make_unique<Block>();
    block->index = {i % blocks_x, i / blocks_x, 0};
    block->size = {threads, 1, 1};
    block->raw.assign(shared_bytes + 1024, char(0xff));
    block->shared = block->raw.data() + (1024 - reinterpret_cast<uintptr_t>(block->raw.data()) % 1024);
    block->warps.resize(threads / 32);
    for (int t = 0; t < threads; ++t) {
      auto thread = std::make_unique<Thread>();
      thread->index = {t, 0, 0};
      thread->block = block.get();
      thread->stack.reset(new char[kStack]);
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = thread->stack.get();
      thread->context.uc_stack.ss_size = kStack;
      thread->context.uc_link = nullptr;
      makecontext(&thread->context, enter, 0);
      all.push_back(std::move(thread));
    }
    blocks.push_back(std::move(block));
  }
  if (backwards) std::reverse(all.begin(), all.end());
  for (size_t left = all.size(), rounds = 0; left > 0; ++rounds) {
    if (rounds > 50'000'000 / all.size()) {
      std::fprintf(stderr, "the kernel does not end: a barrier that some threads never reach?\n");
      std::abort();
    }
    for (size_t first = 0; first < all.size(); first += 32) {
      bool goes_on = false;
      do {
        goes_on = false;
        for (size_t i = first; i < first + 32; ++i) {
          if (all[i]->done) continue;
          current = all[i].get();
          current->waiting = false;
          swapcontext(&scheduler, &current->context);
          left -= current->done;
          goes_on |= backwards && !current->done && !current->waiting;
        }
      } while (goes_on);
    }
  }
}

}  // namespace emulator

inline char* shared_memory() { return emulator::self().block->shared; }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}
inline unsigned load_acquire(const unsigned* address) { return *address; }
inline float4 load_uncached(const float4* address) { return *address; }
inline void pause() { emulator::wait(); }

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    std::fprintf(stderr, "a 16-byte copy off its 16-byte boundary\n");
    std::abort();
  }
  emulator::self().groups.back().push_back({shared, global, 16, valid});
}
inline void copy_commit() { emulator::self().groups.emplace_back(); }
template <int pending>
void copy_wait() {
  auto& groups = emulator::self().groups;  // the last one is still open
  while (int(groups.size()) - 1 > pending) {
    for (const auto& copy : groups.front()) {
      if (copy.valid) {
        memcpy(copy.to, copy.from, copy.bytes);
      } else {
        memset(copy.to, 0, copy.bytes);
      }
    }
    groups.pop_front();
  }
}

inline void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  auto& warp = emulator::warp();
  const int lane = emulator::lane();
  warp.rows[lane] = row;
  emulator::warp_barrier();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      pair[i] = static_cast<const uint16_t*>(warp.rows[matrix * 8 + lane % 4 * 2 + i])[lane / 4];
    }
    fragment[matrix] = pair[0] | uint32_t(pair[1]) << 16;
  }
  emulator::warp_barrier();
}

template <class T>
float half_of(uint32_t word, int high) {
  return to_float(T{uint16_t(word >> (16 * high))});
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& warp = emulator::warp();
  const int lane = emulator::lane();
  memcpy(warp.a[lane], a, sizeof warp.a[lane]);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  emulator::warp_barrier();
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t a_word = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t b_word = warp.b[column * 4 + k % 8 / 2][k / 8];
      d[e] += half_of<T>(a_word, k % 2) * half_of<T>(b_word, k % 2);
    }
  }
  emulator::warp_barrier();
}

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const char*>(pointer) - emulator::self().block->shared);
}

inline void arrival_init(uint64_t* barrier) { emulator::self().block->arrivals[barrier] = {}; }
inline void arrival_init_fence() {}
inline void arrival_expect(uint64_t* barrier, int bytes) { emulator::self().block->arrivals[barrier].announced += bytes; }
inline void copy_box(void* shared, const void* map, int channel, int pixel, uint64_t* barrier) {
  emulator::TensorMap tensor;
  memcpy(&tensor, map, sizeof tensor);
  emulator::self().block->arrivals[barrier].boxes.push_back({static_cast<char*>(shared), tensor, channel, pixel});
}
inline void arrival_wait(uint64_t* barrier, int parity) {
  constexpr int kBoxBytes = 64 * 64 * 2;
  auto& arrival = emulator::self().block->arrivals[barrier];
  while ((arrival.phase & 1) == parity) {
    if (arrival.announced == 0 || arrival.announced != int(arrival.boxes.size()) * kBoxBytes) {
      emulator::wait();
      continue;
    }
    for (const auto& box : arrival.boxes) {
      for (int row = 0; row < 64; ++row) {
        for (int c = 0; c < 64; ++c) {
          const int channel = box.channel + c, pixel = box.pixel + row;
          const bool inside = channel < box.map.channels && pixel < box.map.pixels;
          const uint16_t value = inside ? box.map.base[pixel * box.map.pixel_stride + channel] : 0;
          uint32_t address = shared_address(box.to) + row * 128 + c * 2;
          address ^= (address >> 7 & 7) << 4;
          memcpy(shared_memory() + address, &value, 2);
        }
      }
    }
    arrival.boxes.clear();
    arrival.announced = 0;
    ++arrival.phase;
  }
}

inline void async_proxy_fence() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
inline void wgmma_wait() {
  for (const auto& product : emulator::self().products) product();
  emulator::self().products.clear();
}
template <int count>
void wgmma_results(float (&)[count]) {}

// Each thread computes its own sums, once it waits for them.
template <class T, int WIDTH>
void wgmma(float (&d)[WIDTH * 4], uint64_t a, uint64_t b, int accumulate) {
  float* sums = d;
  char* shared = shared_memory();
  const int warp = emulator::self().index.x / 32 % 4, lane = emulator::lane();
  emulator::self().products.push_back([=] {
    const auto field = [](uint64_t descriptor, int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
    for (int i = 0; i < WIDTH * 4; ++i) {
      const int m = warp * 16 + lane / 4 + i % 4 / 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = accumulate ? sums[i] : 0;
      for (int k = 0; k < 16; ++k) {
        uint32_t a_address = field(a, 0) + k / 8 * field(a, 32) + k % 8 * 128 + m * 2;
        a_address ^= (a_address >> 7 & 7) << 4;
        const uint32_t b_address =
            field(b, 0) + n / 8 * field(b, 32) + k / 8 * field(b, 16) + n % 8 * 16 + k % 8 * 2;
        T a_value, b_value;
        memcpy(&a_value, shared + a_address, 2);
        memcpy(&b_value, shared + b_address, 2);
        sum += to_float(a_value) * to_float(b_value);
      }
      sums[i] = sum;
    }
  });
}

}  // namespace rwn
