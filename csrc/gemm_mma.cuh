// The weight gradient on tensor cores by mma.sync, for 16-bit types on sm_80 and newer, X in channels_last order.
//
// A block owns `tile_channels` (64 or 128) channels, WIDTH * 8 columns of the product, and a split of the pixels. X
// passes once, 64 pixels a stage, through a ring of kStages stages filled by 16-byte cp.async (so channels are a multiple
// of 8, X is aligned to 16 bytes and its strides are multiples of 8). The gradient comes from the slab, whose words hold
// a position and its right neighbour, so that one word is a pair of pixels of mma's B whatever the tap.
// A warp owns 32 channels and all columns; of 64 channels the other two warps take every second 16 pixels, and the two
// halves are added at the end. All sums stay in registers.
// NORMED: X is replaced by relu(x * scale + shift), in float32, rounded to T, as the fragments come out of the ring.
#pragma once
#include "finish.cuh"
#include "ptx.h"
#include "slab.cuh"

namespace rwn {

// Two neighbouring pixels' values of one filter: a word of the slab and of mma's operands, the left pixel low.
RWN_DEVICE void put_pair_word(uint32_t* plane, int place, uint16_t value) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(plane);
  halves[2 * place] = value;
  if (place > 0) halves[2 * place - 1] = value;
}

// One stage's share of this thread: always the same chunk of 8 channels, every `rows`-th pixel.
RWN_DEVICE void load_x_stage(const Task& task, char* stage, int tile, int first_channel) {
  const Geometry& geometry = task.geometry;
  const int chunks = task.tile_channels / 8, chunk = threadIdx.x % chunks, rows = blockDim.x / chunks;
  const int channel = first_channel + chunk * 8;
  const uint16_t* x = static_cast<const uint16_t*>(task.x) + channel;
  for (int row = threadIdx.x / chunks; row < kTilePixels; row += rows) {
    const int v = tile * kTilePixels + row;
    const Pixel at = geometry.pixel(v);
    const bool valid = v < geometry.pixels && at.column < geometry.width && channel < geometry.channels;
    const int64_t offset =
        at.image * task.x_stride[0] + at.row * task.x_stride[2] + at.column * task.x_stride[3];
    copy_async(stage + x_offset(row, chunk), valid ? x + offset : task.x, valid);
  }
}

// relu(x * scale + shift) of the pair of pixels in `word`; a pixel that is none stays zero.
template <class T>
RWN_DEVICE uint32_t normed_pair(uint32_t word, float scale, float shift, bool left, bool right) {
  const float low = fmaf(to_float(T{uint16_t(word)}), scale, shift);
  const float high = fmaf(to_float(T{uint16_t(word >> 16)}), scale, shift);
  const uint32_t low_bits = left ? Rounded<T>::of(fmaxf(low, 0.f)).bits : 0;
  const uint32_t high_bits = right ? Rounded<T>::of(fmaxf(high, 0.f)).bits : 0;
  return low_bits | high_bits << 16;
}

template <class T, int WIDTH, bool NORMED>
RWN_KERNEL void RWN_BOUNDS(kGemmThreads, 2) gemm_mma_kernel(RWN_ARGUMENT Task task) {
  const Geometry& geometry = task.geometry;
  const Share share = share_of_block(task);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warps_across = task.tile_channels / 32;           // warps that share the channels
  const int warp_channel = warp % warps_across * 32, turn = warp / warps_across, turns = 4 / warps_across;
  const int stage_bytes = task.tile_channels * kTilePixels * 2;
  char* ring = shared_memory();
  uint32_t* slab = reinterpret_cast<uint32_t*>(shared_memory() + task.slab_offset);

  int shift[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    shift[j] = geometry.shift(share.first_column + j * 8 + lane / 4, share.first_filter, task.plane);
  }
  float norm_scale[4], norm_shift[4];
  if (NORMED) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = share.first_channel + warp_channel + i * 8 + lane / 4;
      norm_scale[i] = channel < geometry.channels ? task.scale[channel] : 0.f;
      norm_shift[i] = channel < geometry.channels ? task.shift[channel] : 0.f;
    }
  }
  float sums[2][WIDTH][4] = {};

  const int begin = share.begin, end = share.end;
  const int last_pixel = geometry.pixels - 1;
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    if (begin + ahead < end) load_x_stage(task, ring + ahead * stage_bytes, begin + ahead, share.first_channel);
    copy_commit();
  }
  int chunk_end = begin, origin = 0;
  for (int tile = begin; tile < end; ++tile) {
    if (tile == chunk_end) {
      chunk_end = min(tile + task.chunk_tiles, end);
      const int first = tile * kTilePixels;
      origin = geometry.position(first);
      // Every warp is through with the slab it is about to overwrite.
      __syncthreads();
      fill_slab<T>(task, origin, geometry.span(first, min(chunk_end * kTilePixels - 1, last_pixel)),
                   share.first_filter, task.slab_filters,
                   [&](int plane, int place, T value) { put_pair_word(slab + plane * task.plane, place, value.bits); });
    }
    // Of the groups committed so far all but the newest kStages - 2 are here: this tile's stage is. The barrier makes it
    // (and the slab) everyone's, and tells that the stage of the last tile is free.
    copy_wait<kStages - 2>();
    __syncthreads();
    const int ahead = tile + kStages - 1;
    if (ahead < end) load_x_stage(task, ring + (ahead - begin) % kStages * stage_bytes, ahead, share.first_channel);
    copy_commit();

    const char* stage = ring + (tile - begin) % kStages * stage_bytes;
    for (int step = turn; step < kTilePixels / 16; step += turns) {
      const int row = step * 16, pair = tile * kTilePixels + row + lane % 4 * 2;
      // Pixels past the end are zeros in the ring: any position inside the slab serves them.
      const uint32_t* left = slab + geometry.position(min(pair, last_pixel - 1)) - origin;
      const uint32_t* right = slab + geometry.position(min(pair + 8, last_pixel - 1)) - origin;
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int chunk = (warp_channel + m * 16) / 8 + ldmatrix_chunk(lane);
        load_matrices_transposed(a[m], stage + x_offset(row + ldmatrix_pixel(lane), chunk));
      }
      if (NORMED) {
        const int columns_left[2] = {geometry.width - geometry.pixel(pair).column,
                                     geometry.width - geometry.pixel(pair + 8).column};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool inside = pair + i / 2 * 8 <= last_pixel;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            a[m][i] = normed_pair<T>(a[m][i], norm_scale[m * 2 + i % 2], norm_shift[m * 2 + i % 2],
                                     inside && columns_left[i / 2] > 0, inside && columns_left[i / 2] > 1);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const uint32_t b0 = left[shift[j]], b1 = right[shift[j]];
        mma<T>(sums[0][j], a[0], b0, b1);
        mma<T>(sums[1][j], a[1], b0, b1);
      }
    }
  }
  copy_wait<0>();

  // The ring and the slab have done their work.
  in_turns(turns, turn, [&](auto put) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int channel = warp_channel + m * 16 + fragment_row(lane, e);
          put(tile_element(task, j * 8 + fragment_column(lane, e), channel), sums[m][j][e]);
        }
      }
    }
  });
  finish_product(task, share);
}

}  // namespace rwn
