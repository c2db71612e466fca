// The weight gradient in float32 arithmetic, for strict precision, old chips, and any type, layout and channel count.
//
// A block owns 32 * VECTOR channels and up to COLUMNS columns of the product, and a split of the pixels. Its 8 warps take
// the pixels in turn; a lane holds the sums of VECTOR channels in registers, reads each value of X once, straight from
// global memory (VECTOR elements at once, where they lie side by side and are aligned to their size together), and the
// gradient from the slab, whose words all lanes read alike. The warps' sums are added in order at the end.
#pragma once
#include "finish.cuh"
#include "ptx.h"
#include "slab.cuh"

namespace rwn {

template <class T, int VECTOR>
struct alignas(sizeof(T) * VECTOR) Elements {
  T values[VECTOR];
};

template <class T, int VECTOR, int COLUMNS>
RWN_KERNEL void RWN_BOUNDS(kFfmaThreads, 1) gemm_ffma_kernel(RWN_ARGUMENT Task task) {
  constexpr int kWarps = kFfmaThreads / 32, kPixelsAtOnce = 4;
  const Geometry& geometry = task.geometry;
  const Share share = share_of_block(task);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channel = share.first_channel + lane * VECTOR;
  const T* x = static_cast<const T*>(task.x) + channel * task.x_stride[1];
  float* slab = reinterpret_cast<float*>(shared_memory() + task.slab_offset);

  int shift[COLUMNS];
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) shift[j] = geometry.shift(share.first_column + j, share.first_filter, task.plane);
  float sums[COLUMNS][VECTOR] = {};

  for (int tile = share.begin; tile < share.end; tile += task.chunk_tiles) {
    const int first = tile * kTilePixels;
    const int past = min(min(tile + task.chunk_tiles, share.end) * kTilePixels, geometry.pixels);
    const int origin = geometry.position(first);
    __syncthreads();
    fill_slab<T>(task, origin, geometry.span(first, past - 1), share.first_filter, task.slab_filters,
                 [&](int plane, int place, T value) { slab[plane * task.plane + place] = to_float(value); });
    __syncthreads();
    for (int v = first + warp; v < past; v += kWarps * kPixelsAtOnce) {
      Elements<T, VECTOR> values[kPixelsAtOnce];
      int position[kPixelsAtOnce];
#pragma unroll
      for (int i = 0; i < kPixelsAtOnce; ++i) {
        const int pixel = v + i * kWarps;
        const Pixel at = geometry.pixel(pixel);
        const bool valid = pixel < past && at.column < geometry.width && channel < geometry.channels;
        // A pixel past the end counts as zero, wherever it reads.
        position[i] = valid ? geometry.position(pixel) - origin : 0;
        values[i] = {};
        if (valid) {
          values[i] = *reinterpret_cast<const Elements<T, VECTOR>*>(
              x + at.image * task.x_stride[0] + at.row * task.x_stride[2] + at.column * task.x_stride[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < kPixelsAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          const float gradient = slab[position[i] + shift[j]];
#pragma unroll
          for (int u = 0; u < VECTOR; ++u) sums[j][u] += to_float(values[i].values[u]) * gradient;
        }
      }
    }
  }

  in_turns(kWarps, warp, [&](auto put) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
      for (int u = 0; u < VECTOR; ++u) put(tile_element(task, j, lane * VECTOR + u), sums[j][u]);
    }
  });
  finish_product(task, share);
}

}  // namespace rwn
