// From a plan and addresses to a kernel on a stream. Errors are exceptions that carry CUDA's text.
#pragma once
#include <cuda_runtime_api.h>

#include <string>

#include "plan.h"

namespace rwn {

struct Buffers {
  const void *x, *gradient;
  const int64_t* filters;  // null: contiguous from first_filter
  int64_t first_filter;
  const float *scale, *shift;
  void* out;
  float* workspace;
  unsigned* counters;
};

// What the planner needs to know of a device; std::runtime_error where there is none.
Device device_of(int index);

// Asynchronous, on the current device; captured like any kernel where the stream captures.
void launch(const Plan& plan, const Buffers& buffers, cudaStream_t stream);

std::string to_string(const Plan& plan);

}  // namespace rwn
