// The weight gradient on Hopper's tensor cores: TMA brings X, wgmma multiplies, for 16-bit types on sm_90a.
//
// As gemm_mma, a block owns HALVES * 64 channels, WIDTH * 8 columns and a split of the pixels. X passes once, 64 pixels a
// stage: one thread orders boxes of 64 pixels x 64 channels from the copy engine, which lays them down in the 128-byte
// swizzle that wgmma reads as its A, pixels being the k dimension (so X is dense channels_last, of even width, aligned to
// 16 bytes, channels a multiple of 8). B, the unfolded gradient of the stage, is written from the slab into one of two
// buffers by all 128 threads while the tensor cores still work on the last stage.
// One barrier a stage separates everything: after it the stage's B is written and the last stage's product complete, so
// that its place in the ring is free.
#pragma once
#include "finish.cuh"
#include "gemm_mma.cuh"
#include "ptx.h"
#include "slab.cuh"

namespace rwn {

template <class T, int WIDTH, int HALVES>
RWN_KERNEL void RWN_BOUNDS(kGemmThreads, 2) gemm_wgmma_kernel(RWN_ARGUMENT Task task) {
  constexpr int kHalfBytes = kTilePixels * 128, kStageBytes = HALVES * kHalfBytes;
  constexpr int kUnfoldedBytes = WIDTH * kUnfoldedColumnStep;
  const Geometry& geometry = task.geometry;
  const Share share = share_of_block(task);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* ring = shared_memory();
  char* unfolded = ring + kStages * kStageBytes;
  uint64_t* arrivals = reinterpret_cast<uint64_t*>(unfolded + 2 * kUnfoldedBytes);  // one a stage
  uint32_t* slab = reinterpret_cast<uint32_t*>(ring + task.slab_offset);

  int shift[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    shift[j] = geometry.shift(share.first_column + j * 8 + lane / 4, share.first_filter, task.plane);
  }

  const int begin = share.begin, end = share.end;
  const int last_pixel = geometry.pixels - 1;
  const auto order_x_stage = [&](int tile) {
    const int stage = (tile - begin) % kStages;
    arrival_expect(arrivals + stage, kStageBytes);
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      copy_box(ring + stage * kStageBytes + half * kHalfBytes, task.x_map, share.first_channel + half * 64,
               tile * kTilePixels, arrivals + stage);
    }
  };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) arrival_init(arrivals + stage);
    arrival_init_fence();
    for (int tile = begin; tile < min(begin + kStages - 1, end); ++tile) order_x_stage(tile);
  }

  float sums[HALVES][WIDTH * 4];  // begun by the first product
  int chunk_end = begin, origin = 0;
  for (int tile = begin; tile < end; ++tile) {
    const int turn = tile - begin, stage = turn % kStages;
    if (tile == chunk_end) {
      // The barrier of the last stage came after the last use of the slab.
      chunk_end = min(tile + task.chunk_tiles, end);
      const int first = tile * kTilePixels;
      origin = geometry.position(first);
      fill_slab<T>(task, origin, geometry.span(first, min(chunk_end * kTilePixels - 1, last_pixel)),
                   share.first_filter, task.slab_filters,
                   [&](int plane, int place, T value) { put_pair_word(slab + plane * task.plane, place, value.bits); });
      __syncthreads();
    }
    char* columns = unfolded + turn % 2 * kUnfoldedBytes;
#pragma unroll
    for (int eighth = 0; eighth < 2; ++eighth) {
      const int row = (warp * 2 + eighth) * 8, pair = tile * kTilePixels + row + lane % 4 * 2;
      // Pixels past the end are zeros in X: any position inside the slab serves them.
      const uint32_t* from = slab + geometry.position(min(pair, last_pixel - 1)) - origin;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        *reinterpret_cast<uint32_t*>(columns + unfolded_offset(j * 8 + lane / 4, row + lane % 4 * 2)) = from[shift[j]];
      }
    }
    async_proxy_fence();
    wgmma_wait();
    __syncthreads();
    if (threadIdx.x == 0 && tile + kStages - 1 < end) order_x_stage(tile + kStages - 1);
    arrival_wait(arrivals + stage, turn / kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kTilePixels / 16; ++step) {
      const uint64_t b = descriptor_of(shared_address(columns) + step * 2 * kUnfoldedPixelStep, kUnfoldedPixelStep,
                                       kUnfoldedColumnStep, false);
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const uint32_t x = shared_address(ring) + stage * kStageBytes + half * kHalfBytes + step * 16 * 128;
        wgmma<T, WIDTH>(sums[half], descriptor_of(x, 0, 8 * 128, true), b, turn + step > 0);
      }
    }
    wgmma_commit();
  }
  wgmma_wait();
#pragma unroll
  for (int half = 0; half < HALVES; ++half) wgmma_results(sums[half]);

  // The ring has done its work for all warps; after the first barrier the result takes its place.
  in_turns(1, 0, [&](auto put) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int channel = half * 64 + warp * 16 + fragment_row(lane, e);
          put(tile_element(task, j * 8 + fragment_column(lane, e), channel), sums[half][j * 4 + e]);
        }
      }
    }
  });
  finish_product(task, share);
}

}  // namespace rwn
