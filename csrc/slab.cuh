// The gradient of the learned filters, gathered into shared memory with its frame of zeros.
#pragma once
#include "device.h"
#include "numbers.h"
#include "plan.h"

namespace rwn {

// All threads of the block: puts the values at positions first .. first + span - 1 of the filters `first_filter`,
// `first_filter` + 1, ... (`count` of them, fewer at the end) by put(plane, place, value). Reads any layout of
// grad_output, each value once; neighbouring threads take neighbouring filters or neighbouring positions, whichever
// lie side by side in memory.
template <class T, class Put>
RWN_DEVICE void fill_slab(const Task& task, int first, int span, int first_filter, int count, Put put) {
  const Geometry& geometry = task.geometry;
  const T* gradient = static_cast<const T*>(task.gradient);
  const int lanes = 1 << task.slab_lanes_log;
  const int lane = threadIdx.x & (lanes - 1);
  const int positions = blockDim.x >> task.slab_lanes_log;
  count = min(count, geometry.learned - first_filter);
  for (int place = threadIdx.x >> task.slab_lanes_log; place < span; place += positions) {
    const Source from = geometry.source(first + place);
    const T* values = gradient + from.image * task.gradient_stride[0] + from.row * task.gradient_stride[2] +
                      from.column * task.gradient_stride[3];
#pragma unroll 4
    for (int plane = lane; plane < count; plane += lanes) {
      T value{};
      if (from.inside) {
        const int filter = first_filter + plane;
        const int64_t channel = task.filters ? task.filters[filter] : task.first_filter + filter;
        value = values[channel * task.gradient_stride[1]];
      }
      put(plane, place, value);
    }
  }
}

}  // namespace rwn
