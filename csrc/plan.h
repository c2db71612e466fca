// What is asked for (Problem), what it runs on (Device), how it is cut up (Plan), and what a kernel is told (Task).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "geometry.h"

namespace rwn {

enum class Type { float32 = 0, bfloat16 = 1, float16 = 2 };
inline int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

enum class Kernel { ffma, mma, wgmma, depthwise };
const char* name_of(Kernel kernel);

// The weight gradient of `learned` filters. Strides count elements: input N C H W, gradient N K P Q, result K C R S.
struct Problem {
  int batch, channels, height, width, learned;
  int out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  bool depthwise;  // input channel i belongs to learned filter i alone; the result's C is 1
  bool aligned;    // the input begins on a 16-byte boundary
  bool normed;     // the product takes relu(x * scale[c] + shift[c]) in place of x
  Type type, out_type;
  int64_t x_stride[4], gradient_stride[4], out_stride[4];
};

struct Device {
  int capability;             // 90 for 9.0
  int multiprocessors;
  int block_memory;           // shared memory that one block may ask for, bytes
  int multiprocessor_memory;  // shared memory of one multiprocessor, bytes
  double bandwidth;           // of global memory, GB/s (bytes a nanosecond)
  unsigned kernels = ~0u;     // bit int(Kernel): this build holds that kernel's code for this device
};

// Everything a kernel needs, passed by value. The pointers are filled in for each launch.
struct Task {
  Geometry geometry;
  int64_t x_stride[4], gradient_stride[4], out_stride[4];
  const void *x, *gradient;
  const int64_t* filters;  // channels of grad_output, ascending; null: first_filter, first_filter + 1, ...
  int64_t first_filter;
  const float *scale, *shift;  // of the input's channels, where the problem is normed
  void* out;
  float* workspace;    // [channel and column tile][split][tile_columns][tile_channels], where splits > 1
  unsigned* counters;  // one a channel and column tile, zero before the first launch that uses them
  alignas(128) unsigned char x_map[128];  // TMA's view of x, where the kernel has one
  Type out_type;
  int tile_channels, channel_tiles, tile_columns, column_tiles;
  int tiles, splits;                       // of kTilePixels pixels; blocks that share them out
  int chunk_tiles, plane, slab_filters;    // tiles that one filling of the slab serves; its planes
  int slab_lanes_log;                      // log2 of neighbouring threads that read neighbouring filters
  int slab_offset;                         // bytes into shared memory
};

struct Plan {
  Problem problem;
  Device device;
  Kernel kernel;
  int width;           // the instantiation: tile_columns / 8 (ffma: columns), or depthwise's R
  int vector;          // input elements a load: ffma and depthwise
  int blocks, threads, blocks_per_multiprocessor;
  int shared_memory;   // bytes
  int64_t workspace;   // floats
  int counters;
  double bytes, flops;  // read and written by all blocks, from L2 or memory; multiplied and added, padding included
  double microseconds;  // predicted
  Task task;
};

// The column widths that are compiled, in units of 8 columns (ffma: in columns): others round up to the next.
constexpr int kMmaWidths[] = {1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 18};
constexpr int kNormedWidths[] = {2, 4, 7, 12, 18};
constexpr int kWgmmaWidths[] = {2, 3, 4, 5, 7, 9, 12, 15, 18};
constexpr int kFfmaWidths[] = {8, 16, 32};
constexpr int kDepthwiseSizes[] = {3, 5, 7};

constexpr int kStages = 4;                          // of the pipelines over X
constexpr int kGemmThreads = 128, kFfmaThreads = 256;
constexpr int kTilePad = 4;                         // floats after each column of a finished tile in shared memory

// Why this kernel cannot compute this problem on this device; empty if it can.
std::string obstacle(const Problem& problem, const Device& device, Kernel kernel);

// The cheapest way by the cost model, of the kernels that can; std::invalid_argument with the obstacles if none can.
Plan make_plan(const Problem& problem, const Device& device);
Plan make_plan(const Problem& problem, const Device& device, Kernel kernel);

}  // namespace rwn
