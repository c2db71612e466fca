// A problem for every instantiation, and problems of the size of real layers, for the check on a GPU.
#pragma once
#include <map>
#include <vector>

#include "../kernels.h"
#include "cases.h"

namespace rwn::checks {

constexpr Kernel kKernels[] = {Kernel::ffma, Kernel::mma, Kernel::wgmma, Kernel::depthwise};

// The case and the plan of one launch.
struct Trial {
  Case problem;
  Plan plan;
};

// Every kernel that can compute this, planned for the device.
inline std::vector<Trial> trials_of(const Case& c, const Device& device) {
  std::vector<Trial> trials;
  for (const Kernel kernel : kKernels) {
    const Problem problem = problem_of(c);
    if (obstacle(problem, device, kernel).empty()) trials.push_back({c, make_plan(problem, device, kernel)});
  }
  return trials;
}

// One trial for each function that plans for this device can name, on `batch` images of 16 x 14.
inline std::vector<Trial> one_for_every_function(const Device& device, int batch) {
  std::map<Function, Trial> found;
  const auto consider = [&](const Case& c) {
    // A chip with few multiprocessors wants larger tiles.
    for (const int multiprocessors : {device.multiprocessors, 1}) {
      Device smaller = device;
      smaller.multiprocessors = multiprocessors;
      smaller.bandwidth *= double(multiprocessors) / device.multiprocessors;
      for (const Trial& trial : trials_of(c, smaller)) found.insert({function_of(trial.plan), trial});
    }
  };
  for (const Type type : {Type::float32, Type::bfloat16, Type::float16}) {
    for (const int channels : {5, 64, 128}) {
      for (const int size : {3, 2, 1}) {
        // The widest tiles of 128 channels are for many filters, whose gradient is more to read than the input.
        for (int learned = 1; learned <= 160; learned += size == 1 && learned > 20 ? 8 : 1) {
          if (size > 1 && learned > 20) break;
          for (const bool normed : {false, true}) {
            Case c{batch, channels, 16, 14, learned + 3, last(learned + 3, learned), size, size, 1, size / 2};
            c.type = type, c.normed = normed;
            consider(c);
          }
        }
      }
    }
    for (const int size : kDepthwiseSizes) {
      for (const int channels : {7, 40}) {
        for (const int stride : {1, 2}) {
          Case c{batch, channels, 16, 14, channels + 3, last(channels + 3, channels), size, size, stride, size / 2};
          c.type = type, c.depthwise = true;
          consider(c);
        }
      }
    }
  }
  std::vector<Trial> trials;
  for (const auto& [function, trial] : found) trials.push_back(trial);
  return trials;
}

// Layers of WideResNet-28-10, ResNet-50 and MobileNet, and a stem. Sums stay below 2^24, where float32 is exact.
inline std::vector<Case> real_cases() {
  const Type f32 = Type::float32, b16 = Type::bfloat16, h16 = Type::float16;
  return {
      {128, 160, 32, 32, 160, last(160, 2), 3, 3, 1, 1, 1, b16, f32},
      {128, 640, 8, 8, 640, last(640, 6), 3, 3, 1, 1, 1, b16, b16},
      {64, 64, 56, 56, 64, {3, 17, 60}, 3, 3, 1, 1, 1, h16, f32},
      {64, 256, 14, 14, 256, last(256, 13), 3, 3, 1, 1, 1, b16, f32, true, false},
      {64, 256, 28, 28, 64, last(64, 16), 1, 1, 1, 0, 1, b16, f32},
      {64, 128, 28, 28, 128, last(128, 7), 3, 3, 2, 1, 1, h16, f32},
      {64, 64, 28, 28, 64, {0, 9, 10, 63}, 3, 3, 1, 1, 1, b16, f32, true, true, false, true},
      {32, 3, 112, 112, 64, last(64, 4), 7, 7, 2, 3, 1, f32, f32, false, false},
      {64, 32, 32, 32, 32, last(32, 3), 3, 3, 1, 1, 1, f32, f32},
      {64, 100, 28, 28, 144, last(144, 100), 3, 3, 1, 1, 1, b16, f32, true, true, true},
      {64, 31, 28, 28, 60, last(60, 31), 5, 5, 2, 2, 1, f32, f32, false, false, true},
  };
}

}  // namespace rwn::checks
