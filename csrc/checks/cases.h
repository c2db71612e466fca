// The problems that the check programs run, with their data and a loop nest as the reference.
//
// Values are small integers, exact in every type, so that sums are exact too and results are compared with ==. What no
// kernel may read is NaN: the gradient of filters that are not learned.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../numbers.h"
#include "../plan.h"

namespace rwn::checks {

struct Case {
  int batch, channels, height, width, filters;
  std::vector<int64_t> learned;  // channels of grad_output, ascending
  int kernel_h = 3, kernel_w = 3, stride = 1, padding = 1, dilation = 1;
  Type type = Type::bfloat16, out_type = Type::float32;
  bool input_channels_last = true, gradient_channels_last = true, depthwise = false, normed = false;
};

inline std::vector<int64_t> last(int filters, int count) {
  std::vector<int64_t> learned;
  for (int k = filters - count; k < filters; ++k) learned.push_back(k);
  return learned;
}
inline bool contiguous(const std::vector<int64_t>& learned) {
  return learned.back() - learned.front() == int64_t(learned.size()) - 1;
}

inline std::string to_string(const Case& c) {
  char text[200];
  const char* types[] = {"float32", "bfloat16", "float16"};
  std::snprintf(text, sizeof text, "(%d,%d,%d,%d) -> %d of %d %dx%d%s stride %d padding %d dilation %d %s -> %s %s/%s%s%s",
                c.batch, c.channels, c.height, c.width, int(c.learned.size()), c.filters, c.kernel_h, c.kernel_w,
                contiguous(c.learned) ? "" : " scattered", c.stride, c.padding, c.dilation, types[int(c.type)],
                types[int(c.out_type)], c.input_channels_last ? "NHWC" : "NCHW",
                c.gradient_channels_last ? "NHWC" : "NCHW", c.depthwise ? " depthwise" : "", c.normed ? " normed" : "");
  return text;
}

inline void dense_strides(int64_t (&strides)[4], int channels, int height, int width, bool channels_last) {
  const int64_t pixels = int64_t(height) * width;
  strides[0] = pixels * channels;
  strides[1] = channels_last ? 1 : pixels;
  strides[2] = channels_last ? int64_t(width) * channels : width;
  strides[3] = channels_last ? channels : 1;
}

inline Problem problem_of(const Case& c) {
  Problem p{};
  p.batch = c.batch, p.channels = c.channels, p.height = c.height, p.width = c.width, p.learned = int(c.learned.size());
  p.kernel_h = c.kernel_h, p.kernel_w = c.kernel_w;
  p.stride_h = p.stride_w = c.stride, p.padding_h = p.padding_w = c.padding, p.dilation_h = p.dilation_w = c.dilation;
  p.out_height = (c.height + 2 * c.padding - c.dilation * (c.kernel_h - 1) - 1) / c.stride + 1;
  p.out_width = (c.width + 2 * c.padding - c.dilation * (c.kernel_w - 1) - 1) / c.stride + 1;
  p.depthwise = c.depthwise, p.aligned = true, p.normed = c.normed;
  p.type = c.type, p.out_type = c.out_type;
  dense_strides(p.x_stride, c.channels, c.height, c.width, c.input_channels_last);
  dense_strides(p.gradient_stride, c.filters, p.out_height, p.out_width, c.gradient_channels_last);
  const int inner = c.depthwise ? 1 : c.channels;  // the result is channels_last where the input is
  dense_strides(p.out_stride, inner, c.kernel_h, c.kernel_w, c.input_channels_last);
  return p;
}

inline std::vector<char> bytes_of_values(const std::vector<float>& values, Type type) {
  std::vector<char> bytes(values.size() * bytes_of(type));
  for (size_t i = 0; i < values.size(); ++i) {
    if (type == Type::float32) {
      memcpy(&bytes[i * 4], &values[i], 4);
    } else {
      const uint16_t bits =
          type == Type::bfloat16 ? Rounded<bf16>::of(values[i]).bits : Rounded<f16>::of(values[i]).bits;
      memcpy(&bytes[i * 2], &bits, 2);
    }
  }
  return bytes;
}

struct Data {
  std::vector<float> x, gradient, scale, shift;  // as numbers
  std::vector<char> x_bytes, gradient_bytes;     // as the kernel sees them
  std::vector<float> expected;                   // by out_stride, rounded to out_type
  int64_t out_elements;
};

// dW by its definition: over output pixels and taps.
inline Data make_data(const Case& c, const Problem& p, unsigned seed) {
  std::mt19937 random(seed);
  const auto integers = [&](size_t count, int low, int high) {
    std::vector<float> values(count);
    for (float& value : values) value = float(int(random() % (high - low + 1)) + low);
    return values;
  };
  Data data;
  data.x = integers(size_t(c.batch) * c.channels * c.height * c.width, -3, 3);
  data.gradient.assign(size_t(c.batch) * c.filters * p.out_height * p.out_width,
                       std::numeric_limits<float>::quiet_NaN());
  if (c.normed) data.scale = integers(c.channels, -2, 2), data.shift = integers(c.channels, -2, 3);
  data.out_elements = int64_t(p.learned) * (c.depthwise ? 1 : c.channels) * c.kernel_h * c.kernel_w;
  std::vector<double> sums(data.out_elements, 0.0);
  const int64_t(&xs)[4] = p.x_stride;
  const int64_t(&gs)[4] = p.gradient_stride;
  const int64_t(&os)[4] = p.out_stride;
  for (int k = 0; k < p.learned; ++k) {
    for (int n = 0; n < c.batch; ++n) {
      for (int i = 0; i < p.out_height; ++i) {
        for (int j = 0; j < p.out_width; ++j) {
          const float g = float(int(random() % 5) - 2);
          data.gradient[n * gs[0] + c.learned[k] * gs[1] + i * gs[2] + j * gs[3]] = g;
          for (int r = 0; r < c.kernel_h; ++r) {
            for (int s = 0; s < c.kernel_w; ++s) {
              const int h = i * c.stride - c.padding + r * c.dilation, w = j * c.stride - c.padding + s * c.dilation;
              if (h < 0 || h >= c.height || w < 0 || w >= c.width) continue;
              for (int channel = c.depthwise ? k : 0; channel < (c.depthwise ? k + 1 : c.channels); ++channel) {
                double x = data.x[n * xs[0] + channel * xs[1] + h * xs[2] + w * xs[3]];
                if (c.normed) x = std::max(x * data.scale[channel] + data.shift[channel], 0.0);
                sums[k * os[0] + (c.depthwise ? 0 : channel) * os[1] + r * os[2] + s * os[3]] += x * g;
              }
            }
          }
        }
      }
    }
  }
  data.x_bytes = bytes_of_values(data.x, c.type), data.gradient_bytes = bytes_of_values(data.gradient, c.type);
  for (const double sum : sums) {
    const float value = float(sum);
    data.expected.push_back(c.out_type == Type::float32    ? value
                            : c.out_type == Type::bfloat16 ? to_float(Rounded<bf16>::of(value))
                                                           : to_float(Rounded<f16>::of(value)));
  }
  return data;
}

// Results that differ from the reference, with the first of them printed.
inline int64_t count_wrong(const Case& c, const Data& data, const std::vector<char>& out) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < data.out_elements; ++i) {
    float value;
    if (c.out_type == Type::float32) {
      memcpy(&value, &out[i * 4], 4);
    } else {
      uint16_t bits;
      memcpy(&bits, &out[i * 2], 2);
      value = c.out_type == Type::bfloat16 ? to_float(bf16{bits}) : to_float(f16{bits});
    }
    if (!(value == data.expected[i]) && wrong++ == 0) {
      std::printf("  element %lld is %g, not %g\n", static_cast<long long>(i), value, data.expected[i]);
    }
  }
  return wrong;
}

// Geometry, layout and type in every kind of corner, small enough for the emulator.
inline std::vector<Case> small_cases() {
  const Type f32 = Type::float32, b16 = Type::bfloat16, h16 = Type::float16;
  return {
      {2, 8, 5, 6, 4, last(4, 1)},
      {1, 64, 8, 8, 6, {0, 3, 5}},
      {2, 72, 9, 7, 20, last(20, 5), 3, 3, 1, 1, 1, h16, h16},
      {1, 136, 16, 12, 16, last(16, 16), 3, 3, 1, 1, 1, b16, b16, true, false},
      {2, 16, 7, 9, 8, {1, 2, 7}, 3, 3, 2, 1, 1, b16, f32},
      {1, 24, 11, 13, 8, last(8, 2), 5, 5, 1, 2, 1, h16, f32, true, false},
      {1, 16, 13, 10, 8, {2}, 3, 2, 1, 2, 2, b16, f32},
      {2, 8, 9, 8, 40, last(40, 37), 1, 1, 1, 0, 1, b16, b16},
      {1, 8, 12, 10, 4, last(4, 2), 3, 3, 1, 4, 1, b16, f32},
      {1, 8, 10, 9, 30, last(30, 19), 3, 3, 3, 0, 1, h16, f32},
      {3, 8, 1, 1, 4, last(4, 2), 1, 1, 1, 0, 1, b16, f32},
      {1, 8, 20, 20, 3, {0, 2}, 7, 7, 2, 3, 1, b16, f32},
      {4, 64, 8, 8, 64, last(64, 6), 3, 3, 1, 1, 1, b16, f32},
      // so many planes that the slab holds one tile at a time
      {1, 8, 20, 20, 75, last(75, 72), 1, 1, 1, 0, 1, b16, f32},
      {2, 3, 9, 11, 6, last(6, 4), 3, 3, 1, 1, 1, f32, f32, false, false},
      {2, 40, 7, 6, 6, {0, 1, 5}, 3, 3, 2, 0, 1, f32, f32},
      {1, 132, 9, 8, 6, last(6, 4), 3, 3, 1, 1, 1, f32, f32},
      {1, 5, 9, 8, 6, last(6, 2), 3, 3, 1, 1, 1, b16, b16},
      // enough pixels for several splits
      {2, 24, 24, 24, 8, last(8, 3), 3, 3, 1, 1, 1, b16, b16},
      {1, 72, 31, 37, 6, {1, 4}, 3, 3, 1, 1, 1, h16, f32, true, false},
      {5, 8, 15, 16, 9, last(9, 2), 3, 3, 1, 1, 1, f32, f32},
      {2, 64, 8, 7, 8, {0, 3, 5}, 3, 3, 1, 1, 1, b16, f32, true, true, false, true},
      {1, 136, 8, 8, 30, last(30, 20), 3, 3, 1, 1, 1, h16, f32, true, true, false, true},
      {2, 6, 9, 11, 10, last(10, 6), 3, 3, 1, 1, 1, f32, f32, true, true, true},
      {2, 70, 8, 9, 80, last(80, 70), 3, 3, 1, 1, 1, b16, b16, true, true, true},
      {1, 3, 12, 9, 10, {2, 5, 9}, 5, 5, 2, 2, 1, h16, f32, true, false, true},
      {2, 4, 10, 12, 10, {0, 2, 5, 9}, 3, 3, 1, 2, 2, b16, f32, false, false, true},
      {1, 34, 9, 10, 40, last(40, 34), 7, 7, 1, 3, 1, b16, f32, true, true, true},
  };
}

}  // namespace rwn::checks
