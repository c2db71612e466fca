// The inner loops of depthwise filters, after correlate.h and compiled like it: a register of channels at a time,
// pixels where they lie. Over some rows of all channels, which stay in the second level cache, moves each tile of the
// gradient: the taps of a row of the kernel together, every pixel that they reach times the gradient there, channel by
// channel.
#pragma once
#include "weight_grad.h"

namespace rwn::cpu {
namespace {

// Taps at once, side by side.
constexpr int TAPS = 4;
// With so few taps, pixels in turns have sums of their own, or each multiply-add would wait for the last.
constexpr int turns(int taps) { return taps < TAPS ? 4 : 2; }
// Rows of a block, of the input and the gradient.
constexpr int DEPTHWISE_BYTES = 128 * 1024;

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

// Rows of the output, and where the operands of one tile lie: `input` where the pixel at (0, 0) is or would be.
struct Rows {
  int first, count;
  const float* input;
  Steps from;
  const float* gradient;
  Steps outputs;
};

// The taps s to s + COUNT of the kernel's row r, at these columns of the output.
template <int COUNT>
void correlate_taps(const Problem& p, const Rows& b, int r, int s, const Range& columns, float* sums) {
  const int down = b.first * p.stride_h - p.padding_h + r * p.dilation_h;
  const Range rows = reached(down, b.count, p.stride_h, p.height);
  if (rows.size() <= 0 || columns.size() <= 0) return;
  const int right = columns.begin * p.stride_w - p.padding_w + s * p.dilation_w;
  const Walk walk = {
      1, rows.size(), columns.size(), {0, p.stride_h * b.from.row, p.stride_w * b.from.column}, b.outputs};
  accumulate_depthwise<COUNT>(walk, b.input + (down + rows.begin * p.stride_h) * b.from.row + right * b.from.column,
                              p.dilation_w * b.from.column,
                              b.gradient + (b.first + rows.begin) * b.outputs.row + columns.begin * b.outputs.column,
                              sums + int64_t(r * p.kernel_w + s) * LANES);
}

using CorrelateTaps = void (*)(const Problem&, const Rows&, int, int, const Range&, float*);
constexpr CorrelateTaps correlate_by_count[TAPS] = {correlate_taps<1>, correlate_taps<2>, correlate_taps<3>,
                                                    correlate_taps<4>};

Range reached_columns(const Problem& p, int s) {
  return reached(s * p.dilation_w - p.padding_w, p.out_width, p.stride_w, p.width);
}

// sums (taps, LANES) += the share of some rows, of one tile.
void correlate_rows(const Problem& p, const Rows& rows, float* sums) {
  for (int s = 0; s < p.kernel_w; s += TAPS) {
    const int count = smaller(TAPS, p.kernel_w - s);
    // What all of these taps reach; what only some do, each for itself.
    const int begin = reached_columns(p, s).begin, end = larger(begin, reached_columns(p, s + count - 1).end);
    for (int r = 0; r < p.kernel_h; ++r) {
      correlate_by_count[count - 1](p, rows, r, s, {begin, end}, sums);
      for (int tap = s; tap < s + count; ++tap) {
        const Range own = reached_columns(p, tap);
        correlate_taps<1>(p, rows, r, tap, {own.begin, smaller(own.end, begin)}, sums);
        correlate_taps<1>(p, rows, r, tap, {larger(own.begin, end), own.end}, sums);
      }
    }
  }
}

// `input` and `gradient` point to the item's first channel and filter, of the first image.
void correlate_depthwise(const Problem& p, const Item& item, const float* input, const Steps& from,
                         const float* gradient, const Steps& outputs, float* sums) {
  const int row_bytes = (p.out_width + p.stride_h * p.width) * item.channels * int(sizeof(float));
  const int block = larger(1, DEPTHWISE_BYTES / row_bytes);
  for (int n = item.first_image; n < item.first_image + item.images; ++n) {
    for (int row = 0; row < p.out_height; row += block) {
      for (int c = 0; c < item.channels; c += LANES) {
        const int channel = larger(0, smaller(c, item.channels - LANES));
        const Rows rows = {row,  smaller(block, p.out_height - row),     input + channel + n * from.image,
                           from, gradient + channel + n * outputs.image, outputs};
        correlate_rows(p, rows, sums + int64_t(c) * p.taps());
      }
    }
  }
}

}  // namespace
}  // namespace rwn::cpu
