// The weight gradient of chosen depthwise filters: only their channels are read, by plain multiplication.
//
// The input holds the learned channels alone, channel i for learned filter i. A block owns 32 * VECTOR of them and a
// split of the output rows; its 8 warps take the rows in turn. A lane owns VECTOR channels and keeps all SIZE x SIZE sums
// in registers. It walks along a row AT_ONCE outputs at a time; with stride and dilation 1 these share
// SIZE + AT_ONCE - 1 input columns, each read once a row of the filter (and again for other rows, from L1).
// VECTOR 2 reads two neighbouring channels as one word: channels_last, even channel count and strides.
#pragma once
#include "finish.cuh"
#include "gemm_ffma.cuh"
#include "ptx.h"

namespace rwn {

template <class T, int SIZE, int VECTOR, int AT_ONCE>
RWN_KERNEL void RWN_BOUNDS(kFfmaThreads, 1) depthwise_kernel(RWN_ARGUMENT Task task) {
  constexpr int kWarps = kFfmaThreads / 32, kColumns = SIZE + AT_ONCE - 1;
  const Geometry& geometry = task.geometry;
  const Share share = share_of_block(task);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channel = share.first_channel + lane * VECTOR;
  const bool mine = channel < geometry.channels;
  const T* x = static_cast<const T*>(task.x) + channel * task.x_stride[1];
  const T* gradient[VECTOR];
#pragma unroll
  for (int u = 0; u < VECTOR; ++u) {
    const int filter = min(channel + u, geometry.learned - 1);
    const int64_t source = task.filters ? task.filters[filter] : task.first_filter + filter;
    gradient[u] = static_cast<const T*>(task.gradient) + source * task.gradient_stride[1];
  }
  float sums[SIZE][SIZE][VECTOR] = {};

  for (int row = share.begin + warp; row < share.end && mine; row += kWarps) {
    const int image = geometry.by_height.quotient(row), p = row - image * geometry.out_height;
    const int64_t gradient_row = image * task.gradient_stride[0] + p * task.gradient_stride[2];
    const T* image_x = x + image * task.x_stride[0];
    for (int q = 0; q < geometry.out_width; q += AT_ONCE) {
      float values[AT_ONCE][VECTOR];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
        for (int u = 0; u < VECTOR; ++u) {
          const bool inside = q + i < geometry.out_width;
          values[i][u] = inside ? to_float(gradient[u][gradient_row + (q + i) * task.gradient_stride[3]]) : 0.f;
        }
      }
#pragma unroll
      for (int r = 0; r < SIZE; ++r) {
        const int h = p * geometry.stride_h - geometry.origin_h + r * geometry.dilation_h;
        if (h < 0 || h >= geometry.height) continue;
        const T* line = image_x + h * task.x_stride[2];
        Elements<T, VECTOR> columns[kColumns];
#pragma unroll
        for (int s = 0; s < kColumns; ++s) {
          const int w = q * geometry.stride_w - geometry.origin_w + s * geometry.dilation_w;
          columns[s] = {};
          if (w >= 0 && w < geometry.width) {
            columns[s] = *reinterpret_cast<const Elements<T, VECTOR>*>(line + w * task.x_stride[3]);
          }
        }
#pragma unroll
        for (int s = 0; s < SIZE; ++s) {
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
            for (int u = 0; u < VECTOR; ++u) {
              sums[r][s][u] += to_float(columns[s + i].values[u]) * values[i][u];
            }
          }
        }
      }
    }
  }

  in_turns(kWarps, warp, [&](auto put) {
#pragma unroll
    for (int tap = 0; tap < SIZE * SIZE; ++tap) {
#pragma unroll
      for (int u = 0; u < VECTOR; ++u) put(tile_element(task, tap, lane * VECTOR + u), sums[tap / SIZE][tap % SIZE][u]);
    }
  });
  finish(task, share, [&](int tap, int at, float sum) {
    const int filter = share.first_channel + at, r = tap / SIZE, s = tap % SIZE;
    if (filter >= geometry.learned) return;
    store_result(task, filter * task.out_stride[0] + r * task.out_stride[2] + s * task.out_stride[3], sum);
  });
}

}  // namespace rwn
