// The inner loops, compiled once for each instruction set; whoever includes this defines LANES (floats in a register)
// and COLUMNS (filters at once: two registers of sums each must fit beside two of input).
//
// The idea: a block of the input, some rows of one tile of channels, is copied to where it is dense, zeros around it
// included. Over it moves the small gradient: for each tap of the kernel, every pixel of the block is two registers of
// channels, times each filter's gradient there, which is one number. The sums of a tap's filters stay in registers for
// the whole block; its pixels come from the first level cache, taps times.
//
// Nothing of the standard library's inline code here: the linker keeps one copy of it, perhaps this one, for all.
#include "weight_grad.h"

namespace rwn::cpu {
namespace {

constexpr int TILE = 2 * LANES;
// A block has rows of up to this many outputs, and as many of them as the first level cache has room for.
constexpr int BLOCK_COLUMNS = 32;
constexpr int BLOCK_BYTES = 24 * 1024;
// Pixels of the input are asked for so many pixels before they are read.
constexpr int AHEAD = 16;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

int smaller(int a, int b) { return a < b ? a : b; }
int larger(int a, int b) { return a > b ? a : b; }

// Some outputs of one image, and the input they are computed from.
struct Block {
  int row, rows, column, columns;            // of the output
  int top, left, input_rows, input_columns;  // of the input; top and left may lie before it
};

int block_columns(const Problem& p) { return smaller(p.out_width, BLOCK_COLUMNS); }

int input_extent(int outputs, int stride, int kernel, int dilation) {
  return (outputs - 1) * stride + (kernel - 1) * dilation + 1;
}

int block_rows(const Problem& p) {
  const int columns = input_extent(block_columns(p), p.stride_w, p.kernel_w, p.dilation_w);
  const int input_rows = BLOCK_BYTES / (columns * TILE * int(sizeof(float)));
  const int rows = (input_rows - (p.kernel_h - 1) * p.dilation_h - 1) / p.stride_h + 1;
  return larger(1, smaller(p.out_height, rows));
}

Block block_at(const Problem& p, int row, int column) {
  Block b;
  b.row = row, b.rows = smaller(block_rows(p), p.out_height - row);
  b.column = column, b.columns = smaller(block_columns(p), p.out_width - column);
  b.top = row * p.stride_h - p.padding_h, b.left = column * p.stride_w - p.padding_w;
  b.input_rows = input_extent(b.rows, p.stride_h, p.kernel_h, p.dilation_h);
  b.input_columns = input_extent(b.columns, p.stride_w, p.kernel_w, p.dilation_w);
  return b;
}

int64_t scratch_floats(const Problem& p) {
  const Block b = block_at(p, 0, 0);
  return int64_t(b.input_rows) * b.input_columns * TILE;
}

void clear(float* to, int64_t floats) {
  for (int64_t i = 0; i < floats; ++i) to[i] = 0;
}

// One row of the block, (input_columns, TILE).
void pack_row(const Problem& p, const Item& item, const Block& b, const float* row, float* to) {
  const int before = smaller(larger(-b.left, 0), b.input_columns);
  const int after = larger(smaller(p.width - b.left, b.input_columns), before);
  const int64_t step = p.input_stride[3], channel = p.input_stride[1];
  clear(to, int64_t(before) * TILE);
  clear(to + int64_t(after) * TILE, int64_t(b.input_columns - after) * TILE);
  const float* from = row + (b.left + before) * step;
  to += int64_t(before) * TILE;
  const int count = after - before;
  if (channel == 1 && item.channels == TILE) {
    for (int i = 0; i < count; ++i, from += step, to += TILE) {
      __builtin_prefetch(from + AHEAD * step);
      reinterpret_cast<Vector*>(to)[0] = reinterpret_cast<const Vector*>(from)[0];
      *reinterpret_cast<Vector*>(to + LANES) = *reinterpret_cast<const Vector*>(from + LANES);
    }
    return;
  }
  if (item.channels < TILE) clear(to, int64_t(count) * TILE);
  for (int c = 0; c < item.channels; ++c) {
    for (int i = 0; i < count; ++i) to[i * TILE + c] = from[c * channel + i * step];
  }
}

void pack(const Problem& p, const Item& item, const Block& b, const float* image, float* to) {
  for (int i = 0; i < b.input_rows; ++i, to += int64_t(b.input_columns) * TILE) {
    const int h = b.top + i;
    if (h < 0 || h >= p.height) {
      clear(to, int64_t(b.input_columns) * TILE);
    } else {
      pack_row(p, item, b, image + h * p.input_stride[2], to);
    }
  }
}

// Where the operands of one tap lie: pixels step along a row, rows follow each other.
struct Walk {
  int rows, columns;
  int64_t input_row, input_step, gradient_row, gradient_step;
};

// sums (FILTERS, TILE) += over the block's pixels, gradient (FILTERS) times input (TILE). With few filters, PHASES
// pixels at a time have sums of their own, or each multiply-add would wait for the last.
template <int FILTERS, int PHASES>
void accumulate(const Walk& walk, const float* input, const float* gradient, float* sums) {
  Vector acc[PHASES][FILTERS][2] = {};
  for (int row = 0; row < walk.rows; ++row) {
    const float* x = input + row * walk.input_row;
    const float* g = gradient + row * walk.gradient_row;
    int column = 0;
    for (; column + PHASES <= walk.columns; column += PHASES) {
#pragma GCC unroll 4
      for (int phase = 0; phase < PHASES; ++phase) {
        const Vector low = *reinterpret_cast<const Vector*>(x), high = *reinterpret_cast<const Vector*>(x + LANES);
#pragma GCC unroll 16
        for (int f = 0; f < FILTERS; ++f) {
          acc[phase][f][0] += low * g[f];
          acc[phase][f][1] += high * g[f];
        }
        x += walk.input_step;
        g += walk.gradient_step;
      }
    }
    for (; column < walk.columns; ++column) {
      const Vector low = *reinterpret_cast<const Vector*>(x), high = *reinterpret_cast<const Vector*>(x + LANES);
#pragma GCC unroll 16
      for (int f = 0; f < FILTERS; ++f) {
        acc[0][f][0] += low * g[f];
        acc[0][f][1] += high * g[f];
      }
      x += walk.input_step;
      g += walk.gradient_step;
    }
  }
#pragma GCC unroll 16
  for (int f = 0; f < FILTERS; ++f) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vector total = acc[0][f][half];
#pragma GCC unroll 4
      for (int phase = 1; phase < PHASES; ++phase) total += acc[phase][f][half];
      *reinterpret_cast<Vector*>(sums + f * TILE + half * LANES) += total;
    }
  }
}

using Accumulate = void (*)(const Walk&, const float*, const float*, float*);

constexpr int phases(int filters) { return filters * 2 > COLUMNS ? 1 : filters * 4 > COLUMNS ? 2 : 4; }

template <int... FILTERS>
struct Table {
  Accumulate of[sizeof...(FILTERS)] = {accumulate<FILTERS, phases(FILTERS)>...};
};
#if COLUMNS == 6
constexpr Table<1, 2, 3, 4, 5, 6> table;
#else
constexpr Table<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12> table;
#endif

void correlate(const Problem& p, const Item& item, const float* input, const float* gradient, float* scratch,
               float* sums) {
  const int parts = (p.learned + COLUMNS - 1) / COLUMNS;
  for (int n = item.first_image; n < item.first_image + item.images; ++n) {
    const float* image = input + n * p.input_stride[0] + item.first_channel * p.input_stride[1];
    const float* grad_image = gradient + int64_t(n) * p.out_height * p.out_width * p.learned;
    for (int row = 0; row < p.out_height; row += block_rows(p)) {
      for (int column = 0; column < p.out_width; column += block_columns(p)) {
        const Block b = block_at(p, row, column);
        pack(p, item, b, image, scratch);
        const float* g = grad_image + (int64_t(row) * p.out_width + column) * p.learned;
        const Walk walk = {b.rows,
                           b.columns,
                           int64_t(p.stride_h) * b.input_columns * TILE,
                           int64_t(p.stride_w) * TILE,
                           int64_t(p.out_width) * p.learned,
                           p.learned};
        for (int tap = 0; tap < p.taps(); ++tap) {
          const int r = tap / p.kernel_w, s = tap % p.kernel_w;
          const float* x = scratch + (int64_t(r) * p.dilation_h * b.input_columns + s * p.dilation_w) * TILE;
          // The filters in parts of nearly equal size.
          for (int part = 0; part < parts; ++part) {
            const int begin = p.learned * part / parts, end = p.learned * (part + 1) / parts;
            table.of[end - begin - 1](walk, x, g + begin, sums + (int64_t(tap) * p.learned + begin) * TILE);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace rwn::cpu
