// The end of every kernel: the block's tile of the result, in shared memory, becomes a part of the weight gradient.
//
// Deterministic and one launch: with several splits each block writes its partial tile to the workspace, the blocks of
// a tile meet at a barrier, and each then sums its own slice of the tile over all splits in ascending order. So the
// sum is spread over all multiprocessors, and its order depends on nothing but the plan. The barrier needs all blocks
// to be resident at once: such plans are launched cooperatively.
#pragma once
#include "device.h"
#include "numbers.h"
#include "plan.h"
#include "ptx.h"
#include "share.cuh"

namespace rwn {

// Threads that share the sum of one group of 4 results: each takes every 8th split.
constexpr int kSumLanes = 8;

RWN_DEVICE void store_result(const Task& task, int64_t offset, float value) {
  if (task.out_type == Type::float32) {
    static_cast<float*>(task.out)[offset] = value;
  } else if (task.out_type == Type::bfloat16) {
    static_cast<bf16*>(task.out)[offset] = Rounded<bf16>::of(value);
  } else {
    static_cast<f16*>(task.out)[offset] = Rounded<f16>::of(value);
  }
}

// Result `column` (of the product), `channel`; nothing where the tile hangs over the edge.
RWN_DEVICE void store_element(const Task& task, int column, int channel, float value) {
  const Geometry& geometry = task.geometry;
  if (column >= geometry.columns || channel >= geometry.channels) return;
  const int filter = geometry.filter_of(column);
  const int tap = column - filter * int(geometry.by_taps.divisor);
  const int r = geometry.by_kernel_w.quotient(tap), s = tap - r * geometry.kernel_w;
  store_result(task,
               filter * task.out_stride[0] + channel * task.out_stride[1] + r * task.out_stride[2] +
                   s * task.out_stride[3],
               value);
}

// Returns once all `blocks` blocks that share the counter have come here; what they wrote before is then visible.
// The counter's low 31 bits are 0 again afterwards and its top bit has flipped, so it serves any number of launches,
// of any number of blocks, one after the other. `leader` is true in exactly one of the blocks.
RWN_DEVICE void meet(unsigned* counter, unsigned blocks, bool leader) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const unsigned arrivals = leader ? 0x80000000u - (blocks - 1) : 1u;
    const unsigned before = atomicAdd(counter, arrivals);
    while (((load_acquire(counter) ^ before) & 0x80000000u) == 0) pause();
    __threadfence();
  }
  __syncthreads();
}

// The block's tile, [tile_columns][tile_channels + kTilePad] from the beginning of shared memory. All else that stood
// there must have done its work.
RWN_DEVICE float& tile_element(const Task& task, int column, int channel) {
  return reinterpret_cast<float*>(shared_memory())[column * (task.tile_channels + kTilePad) + channel];
}

// All threads of the block: those whose `turn` is 0 call put(set), then those of turn 1, ... call put(add), where
// set(place, sum) begins a sum and add continues it.
template <class Put>
RWN_DEVICE void in_turns(int turns, int turn, Put put) {
  for (int now = 0; now < turns; ++now) {
    __syncthreads();
    if (now == turn) put([now](float& place, float sum) { place = now == 0 ? sum : place + sum; });
  }
  __syncthreads();
}

// All threads of the block, the tile being complete and seen by them all: `store(column, channel, sum)` takes the
// results, counted within the tile. Behind the tile are 16 bytes a thread of shared memory for the sums.
template <class Store>
RWN_DEVICE void finish(const Task& task, const Share& share, Store store) {
  const float* tile = &tile_element(task, 0, 0);
  float4* scratch = reinterpret_cast<float4*>(&tile_element(task, task.tile_columns, 0));
  const int channels = task.tile_channels, pitch = channels + kTilePad;
  const int quads_a_column = channels / 4, quads = task.tile_columns * quads_a_column;
  if (task.splits == 1) {
    for (int i = threadIdx.x; i < quads * 4; i += blockDim.x) {
      const int column = i / channels, channel = i - column * channels;
      store(column, channel, tile[column * pitch + channel]);
    }
    return;
  }
  float4* partials = reinterpret_cast<float4*>(task.workspace) + int64_t(share.tile) * task.splits * quads;
  for (int i = threadIdx.x; i < quads; i += blockDim.x) {
    const int column = i / quads_a_column;
    partials[int64_t(share.split) * quads + i] =
        *reinterpret_cast<const float4*>(tile + column * pitch + (i - column * quads_a_column) * 4);
  }
  meet(task.counters + share.tile, task.splits, share.split == 0);

  const int first = split_begin(share.split, task.splits, quads);
  const int end = split_begin(share.split + 1, task.splits, quads);
  const int lane = threadIdx.x % kSumLanes, groups = blockDim.x / kSumLanes;
  // Every thread makes the same number of rounds: they meet in each.
  for (int base = first; base < end; base += groups) {
    const int i = base + threadIdx.x / kSumLanes;
    float4 sum = {0, 0, 0, 0};
    if (i < end) {
#pragma unroll 8
      for (int s = lane; s < task.splits; s += kSumLanes) {
        const float4 part = load_uncached(partials + int64_t(s) * quads + i);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
    }
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (i < end && lane < 4) {
      const float* parts = reinterpret_cast<const float*>(scratch + threadIdx.x - lane) + lane;
      float total = 0;
#pragma unroll
      for (int l = 0; l < kSumLanes; ++l) total += parts[l * 4];
      const int column = i / quads_a_column;
      store(column, (i - column * quads_a_column) * 4 + lane, total);
    }
    __syncthreads();
  }
}

// Likewise for a tile of the matrix product.
RWN_DEVICE void finish_product(const Task& task, const Share& share) {
  finish(task, share, [&](int column, int channel, float sum) {
    store_element(task, share.first_column + column, share.first_channel + channel, sum);
  });
}

}  // namespace rwn
