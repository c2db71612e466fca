// The inner loops of depthwise filters, after correlate.h and compiled like it: a register of channels at a time,
// pixels where they lie. Over a block, some rows of all channels of the item, which stay in the second level cache,
// moves each tile of the gradient: the taps of a row of the kernel together, every pixel that they reach times the
// gradient there, channel by channel.
#pragma once
#include "weight_grad.h"

namespace rwn::cpu {
namespace {

// Taps at once, side by side.
constexpr int DEPTHWISE_TAPS = 4;
// Pixels in turns have sums of their own, or each multiply-add would wait for the last.
constexpr int turns(int taps) { return taps < DEPTHWISE_TAPS ? 4 : 2; }
// A block of more than a row has up to so many bytes of input and gradient; and every block so few outputs that sums
// stay accurate.
constexpr int DEPTHWISE_BYTES = 128 * 1024;
constexpr int DEPTHWISE_OUTPUTS = 1024;

// sums (COUNT, LANES) += over the walk's pixels, gradient (LANES) times the inputs (LANES) `apart` from each other.
template <int COUNT>
void accumulate_depthwise(const Walk& walk, const float* input, int64_t apart, const float* gradient, float* sums) {
  constexpr int TURNS = turns(COUNT);
  Vector acc[TURNS][COUNT] = {};
  const auto add = [&](Vector* to, const float* x, const float* g) {
    const Vector there = *reinterpret_cast<const Vector*>(g);
#pragma GCC unroll 4
    for (int tap = 0; tap < COUNT; ++tap) to[tap] += there * *reinterpret_cast<const Vector*>(x + tap * apart);
  };
  for (int row = 0; row < walk.rows; ++row) {
    const float* x = input + row * walk.input.row;
    const float* g = gradient + row * walk.gradient.row;
    int column = 0;
    for (; column + TURNS <= walk.columns; column += TURNS) {
#pragma GCC unroll 4
      for (int turn = 0; turn < TURNS; ++turn, x += walk.input.column, g += walk.gradient.column) add(acc[turn], x, g);
    }
    for (; column < walk.columns; ++column, x += walk.input.column, g += walk.gradient.column) add(acc[0], x, g);
  }
#pragma GCC unroll 4
  for (int tap = 0; tap < COUNT; ++tap) {
    Vector total = acc[0][tap];
#pragma GCC unroll 4
    for (int turn = 1; turn < TURNS; ++turn) total += acc[turn][tap];
    *reinterpret_cast<Vector*>(sums + tap * LANES) += total;
  }
}

// A block of the output, and where the operands of one tile lie: `input` where the pixel at (0, 0) is.
struct DepthwiseBlock {
  int row, rows;
  Range columns;
  const float* input;
  Steps from;
  const float* gradient;
  Steps outputs;
};

// The taps s to s + COUNT of the kernel's row r, at these columns of the output.
template <int COUNT>
void correlate_taps(const Problem& p, const DepthwiseBlock& b, int r, int s, const Range& columns, float* sums) {
  const int down = b.row * p.stride_h - p.padding_h + r * p.dilation_h;
  const Range rows = reached(down, b.rows, p.stride_h, p.height);
  if (rows.size() <= 0 || columns.size() <= 0) return;
  const int right = columns.begin * p.stride_w - p.padding_w + s * p.dilation_w;
  const Walk walk = {
      1, rows.size(), columns.size(), {0, p.stride_h * b.from.row, p.stride_w * b.from.column}, b.outputs, 0, {}};
  accumulate_depthwise<COUNT>(walk, b.input + (down + rows.begin * p.stride_h) * b.from.row + right * b.from.column,
                              p.dilation_w * b.from.column,
                              b.gradient + (b.row + rows.begin) * b.outputs.row + columns.begin * b.outputs.column,
                              sums + int64_t(r * p.kernel_w + s) * LANES);
}

using CorrelateTaps = void (*)(const Problem&, const DepthwiseBlock&, int, int, const Range&, float*);
constexpr CorrelateTaps correlate_by_count[DEPTHWISE_TAPS] = {correlate_taps<1>, correlate_taps<2>, correlate_taps<3>,
                                                              correlate_taps<4>};

// Of the block's columns, those for which the kernel's column s lies within the input.
Range reached_columns(const Problem& p, const DepthwiseBlock& b, int s) {
  const Range all = reached(s * p.dilation_w - p.padding_w, p.out_width, p.stride_w, p.width);
  const int begin = smaller(larger(all.begin, b.columns.begin), b.columns.end);
  return {begin, larger(smaller(all.end, b.columns.end), begin)};
}

// sums (taps, LANES) += the share of a block, of one tile.
void correlate_block(const Problem& p, const DepthwiseBlock& b, float* sums) {
  for (int s = 0; s < p.kernel_w; s += DEPTHWISE_TAPS) {
    const int count = smaller(DEPTHWISE_TAPS, p.kernel_w - s);
    // What all of these taps reach; what only some do, each for itself.
    const int begin = reached_columns(p, b, s).begin, end = larger(begin, reached_columns(p, b, s + count - 1).end);
    for (int r = 0; r < p.kernel_h; ++r) {
      correlate_by_count[count - 1](p, b, r, s, {begin, end}, sums);
      for (int tap = s; tap < s + count; ++tap) {
        const Range own = reached_columns(p, b, tap);
        correlate_taps<1>(p, b, r, tap, {own.begin, smaller(own.end, begin)}, sums);
        correlate_taps<1>(p, b, r, tap, {larger(own.begin, end), own.end}, sums);
      }
    }
  }
}

// `input` and `gradient` point to the item's first channel and filter, of the first image.
void correlate_depthwise(const Problem& p, const Item& item, const float* input, const Steps& from,
                         const float* gradient, const Steps& outputs, float* sums) {
  const int width = smaller(p.out_width, DEPTHWISE_OUTPUTS);
  const int64_t row_bytes = int64_t(1 + p.stride_h * p.stride_w) * width * item.channels * int64_t(sizeof(float));
  const int height = larger(1, smaller(DEPTHWISE_OUTPUTS / width, int(DEPTHWISE_BYTES / row_bytes)));
  for (int n = item.first_image; n < item.first_image + item.images; ++n) {
    for (int row = 0; row < p.out_height; row += height) {
      for (int column = 0; column < p.out_width; column += width) {
        for (int c = 0; c < item.channels; c += LANES) {
          const int channel = larger(0, smaller(c, item.channels - LANES));
          const DepthwiseBlock b = {row,
                                    smaller(height, p.out_height - row),
                                    {column, smaller(column + width, p.out_width)},
                                    input + channel + n * from.image,
                                    from,
                                    gradient + channel + n * outputs.image,
                                    outputs};
          correlate_block(p, b, sums + int64_t(c) * p.taps());
        }
      }
    }
  }
}

}  // namespace
}  // namespace rwn::cpu
