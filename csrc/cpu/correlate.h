// The inner loops, compiled once for each instruction set; whoever includes this defines LANES (floats in a register)
// and COLUMNS (filters at once: two registers of sums each must fit beside two of input).
//
// The idea: a block of the input, some rows of one tile of channels, or some small images of it, is copied to where
// it is dense. Over it moves the small gradient: for each tap of the kernel, every pixel of the block that the tap
// reaches is two registers of channels, times each filter's gradient there, which is one number. The sums of a tap's
// filters stay in registers for the whole block; its pixels come from the first level cache, taps times. With so few
// filters that registers are left, several taps of a row of the kernel share a pixel: each finds its own gradient for
// it, a zero where it has none. A single tap reads the input where it lies, and so do these where that is dense enough,
// a block's tiles one after another, so that memory is read in the order it is in.
//
// Nothing of the standard library's inline code here: the linker keeps one copy of it, perhaps this one, for all.
#include "weight_grad.h"

namespace rwn::cpu {
namespace {

constexpr int TILE = 2 * LANES;
// A block has rows of up to this many outputs, and as many of them as the first level cache has room for.
constexpr int BLOCK_COLUMNS = 32;
// With a single tap it has so many outputs: cache lines in which one tile ends and the next begins are still there.
constexpr int SINGLE_TAP_OUTPUTS = 128;
// So many taps share a pixel at most. These read it where it lies, too, once for each row of the kernel, if pixels are
// no further apart than so many channels: then they are not all in the same few places of the cache.
constexpr int TAPS_TOGETHER = 3, IN_PLACE_CHANNELS = 128;
// Pixels of the input are asked for so many pixels before they are copied, or else used where they lie.
constexpr int PACK_AHEAD = 16, FAR_AHEAD = 256;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

int smaller(int a, int b) { return a < b ? a : b; }
int larger(int a, int b) { return a > b ? a : b; }

// Some outputs of each of some images, and the input they are computed from. Where taps share pixels, `columns` are
// those of the input.
struct Block {
  int image, images;
  int row, rows, column, columns;            // of the output
  int top, left, input_rows, input_columns;  // of the input; top and left may lie before it
};

// Whether taps share pixels. Each then sees all columns, zeros of the gradient for those that are not its own: few,
// unless the kernel is as wide as the image. A pixel that is not finite makes every tap of its row of the kernel NaN.
bool together(const Problem& p) {
  return p.kernel_w > 1 && p.stride_w == 1 && p.learned <= COLUMNS / 2 && p.width < 2 * p.out_width;
}

// So many columns of zeros on either side of the gradient are read then.
int gradient_halo(const Problem& p) { return together(p) ? (p.kernel_w - 1) * p.dilation_w : 0; }

int all_columns(const Problem& p) { return together(p) ? p.width : p.out_width; }

int block_columns(const Problem& p) { return smaller(all_columns(p), BLOCK_COLUMNS); }

int input_extent(int outputs, int stride, int kernel, int dilation) {
  return (outputs - 1) * stride + (kernel - 1) * dilation + 1;
}

int input_columns(const Problem& p, int columns) {
  return together(p) ? columns : input_extent(columns, p.stride_w, p.kernel_w, p.dilation_w);
}

int block_rows(const Problem& p) {
  if (p.taps() == 1) return larger(1, smaller(p.out_height, SINGLE_TAP_OUTPUTS / block_columns(p)));
  const int64_t input_row = int64_t(input_columns(p, block_columns(p))) * TILE;
  const int64_t gradient_row = int64_t(block_columns(p)) * p.learned;
  // The first one takes so much more than the others.
  const int64_t first = (int64_t(p.kernel_h - 1) * p.dilation_h + 1 - p.stride_h) * input_row;
  const int64_t rows = (p.block_floats - first) / (p.stride_h * input_row + gradient_row);
  return rows < 1 ? 1 : rows < p.out_height ? int(rows) : p.out_height;
}

// Small images share a block; then it holds each of them whole.
int block_images(const Problem& p) {
  if (block_rows(p) < p.out_height || block_columns(p) < all_columns(p)) return 1;
  const int64_t rows = input_extent(p.out_height, p.stride_h, p.kernel_h, p.dilation_h);
  const int64_t outputs = int64_t(p.out_height) * all_columns(p);
  return larger(1, int(p.block_floats / (rows * input_columns(p, all_columns(p)) * TILE + outputs * p.learned)));
}

Block block_at(const Problem& p, int image, int images, int row, int column) {
  Block b;
  b.image = image, b.images = images;
  b.row = row, b.rows = smaller(block_rows(p), p.out_height - row);
  b.column = column, b.columns = smaller(block_columns(p), all_columns(p) - column);
  b.top = row * p.stride_h - p.padding_h, b.left = together(p) ? column : column * p.stride_w - p.padding_w;
  b.input_rows = input_extent(b.rows, p.stride_h, p.kernel_h, p.dilation_h);
  b.input_columns = input_columns(p, b.columns);
  return b;
}

int64_t scratch_floats(const Problem& p) {
  const Block b = block_at(p, 0, block_images(p), 0, 0);
  return int64_t(b.images) * b.input_rows * b.input_columns * TILE;
}

// What a block's places along one axis, input pixels or outputs, share with what there is.
struct Range {
  int begin, end;
  int size() const { return end - begin; }
};

// Of `count` places from `first` on, those within an axis of `size`.
Range within(int first, int count, int size) {
  const int begin = smaller(larger(-first, 0), count);
  return {begin, larger(smaller(size - first, count), begin)};
}

// Of `outputs`, those whose input at a tap, `first + output * stride`, lies within an axis of `size`.
Range reached(int first, int outputs, int stride, int size) {
  const int begin = first < 0 ? smaller((-first + stride - 1) / stride, outputs) : 0;
  const int end = first < size ? smaller((size - 1 - first) / stride + 1, outputs) : 0;
  return {begin, larger(end, begin)};
}

// One row of the block, (input_columns, TILE); what lies around the input is never read.
void pack_row(const Problem& p, const Block& b, int channels, const float* row, float* to) {
  const Range there = within(b.left, b.input_columns, p.width);
  const int64_t step = p.input_stride[3], channel = p.input_stride[1];
  const float* from = row + (b.left + there.begin) * step;
  to += int64_t(there.begin) * TILE;
  if (channel == 1 && channels == TILE) {
    for (int i = there.begin; i < there.end; ++i, from += step, to += TILE) {
      __builtin_prefetch(from + PACK_AHEAD * step);
      reinterpret_cast<Vector*>(to)[0] = reinterpret_cast<const Vector*>(from)[0];
      *reinterpret_cast<Vector*>(to + LANES) = *reinterpret_cast<const Vector*>(from + LANES);
    }
    return;
  }
  if (channels < TILE) {
    for (int64_t i = 0; i < int64_t(there.size()) * TILE; ++i) to[i] = 0;
  }
  for (int c = 0; c < channels; ++c) {
    for (int i = 0; i < there.size(); ++i) to[i * TILE + c] = from[c * channel + i * step];
  }
}

// `input` points to the first of the block's channels.
void pack(const Problem& p, const Block& b, int channels, const float* input, float* to) {
  const Range there = within(b.top, b.input_rows, p.height);
  for (int n = b.image; n < b.image + b.images; ++n, to += int64_t(b.input_rows) * b.input_columns * TILE) {
    for (int i = there.begin; i < there.end; ++i) {
      pack_row(p, b, channels, input + n * p.input_stride[0] + (b.top + i) * p.input_stride[2],
               to + int64_t(i) * b.input_columns * TILE);
    }
  }
}

// What is asked for while pixels are worked on: nothing, others further on in the same walk, or those of `Ahead`: all,
// pixel by pixel, or in walks that are short, and so share what there is to wait for, a part before each row.
enum Asks { NOTHING, FURTHER_ON, ELSEWHERE, ELSEWHERE_IN_PARTS };

// Pixels that are needed next.
struct Ahead {
  const float* first;
  Steps steps;
  int part, parts;
};

// The operands of one tap, or of some that share pixels.
struct Walk {
  int images, rows, columns;
  Steps input, gradient;
  int64_t tap;  // from the gradient of one to that of the one before it
  Ahead ahead;
};

// The same walk, rows and images that follow each other without a gap being one.
Walk joined(Walk walk) {
  if (walk.input.row == walk.columns * walk.input.column && walk.gradient.row == walk.columns * walk.gradient.column) {
    walk.columns *= walk.rows, walk.rows = 1;
    if (walk.input.image == walk.columns * walk.input.column &&
        walk.gradient.image == walk.columns * walk.gradient.column) {
      walk.columns *= walk.images, walk.images = 1;
    }
  }
  return walk;
}

// The same walk, the same column of all images before the next one: a block of small images has more of them than
// columns, and the innermost loop should be the longest.
Walk turned(Walk walk) {
  const auto turn = [](auto& a, auto& b) {
    const auto before = a;
    a = b, b = before;
  };
  turn(walk.images, walk.columns);
  turn(walk.input.image, walk.input.column);
  turn(walk.gradient.image, walk.gradient.column);
  turn(walk.ahead.steps.image, walk.ahead.steps.column);
  return walk;
}

// How much of `all` the part of this number begins with, where there are so many parts of nearly equal size.
int part_begin(int all, int parts, int part) { return all * part / parts; }

// sums (TAPS, FILTERS, TILE), a tap's `apart` from the next one's, += over the walk's pixels, gradient (FILTERS) times
// input (TILE). With few sums, PHASES pixels at a time have sums of their own, or each multiply-add would wait for the
// last.
template <Asks ASKS, int TAPS, int FILTERS, int PHASES>
void accumulate(const Walk& walk, const float* input, const float* gradient, float* sums, int64_t apart) {
  Vector acc[PHASES][TAPS][FILTERS][2] = {};
  const auto add = [&](Vector(*to)[FILTERS][2], const float* x, const float* g) {
    const Vector low = *reinterpret_cast<const Vector*>(x), high = *reinterpret_cast<const Vector*>(x + LANES);
#pragma GCC unroll 4
    for (int tap = 0; tap < TAPS; ++tap) {
#pragma GCC unroll 16
      for (int f = 0; f < FILTERS; ++f) {
        to[tap][f][0] += low * g[f - tap * walk.tap];
        to[tap][f][1] += high * g[f - tap * walk.tap];
      }
    }
  };
  const Ahead& next = walk.ahead;
  const int begin = ASKS == ELSEWHERE_IN_PARTS ? part_begin(walk.columns, next.parts, next.part) : 0;
  const int end = ASKS == ELSEWHERE_IN_PARTS ? part_begin(walk.columns, next.parts, next.part + 1) : 0;
  for (int image = 0; image < walk.images; ++image) {
    for (int row = 0; row < walk.rows; ++row) {
      const float* x = input + image * walk.input.image + row * walk.input.row;
      const float* g = gradient + image * walk.gradient.image + row * walk.gradient.row;
      const float* ahead = next.first + image * next.steps.image + row * next.steps.row;
      for (int i = begin; i < end; ++i) __builtin_prefetch(ahead + i * next.steps.column);
      int column = 0;
      for (; column + PHASES <= walk.columns; column += PHASES) {
#pragma GCC unroll 4
        for (int phase = 0; phase < PHASES; ++phase) {
          if (ASKS == FURTHER_ON) __builtin_prefetch(x + FAR_AHEAD * walk.input.column);
          if (ASKS == ELSEWHERE) __builtin_prefetch(ahead), ahead += next.steps.column;
          add(acc[phase], x, g);
          x += walk.input.column;
          g += walk.gradient.column;
        }
      }
      for (; column < walk.columns; ++column) {
        add(acc[0], x, g);
        x += walk.input.column;
        g += walk.gradient.column;
      }
    }
  }
#pragma GCC unroll 4
  for (int tap = 0; tap < TAPS; ++tap) {
#pragma GCC unroll 16
    for (int f = 0; f < FILTERS; ++f) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Vector total = acc[0][tap][f][half];
#pragma GCC unroll 4
        for (int phase = 1; phase < PHASES; ++phase) total += acc[phase][tap][f][half];
        *reinterpret_cast<Vector*>(sums + tap * apart + f * TILE + half * LANES) += total;
      }
    }
  }
}

using Accumulate = void (*)(const Walk&, const float*, const float*, float*, int64_t);

constexpr int phases(int sums) { return sums * 2 > COLUMNS ? 1 : sums * 4 > COLUMNS ? 2 : 4; }

template <Asks ASKS, int TAPS, int... FILTERS>
struct Table {
  Accumulate of[sizeof...(FILTERS)] = {accumulate<ASKS, TAPS, FILTERS, phases(TAPS* FILTERS)>...};
};
template <Asks ASKS>
#if COLUMNS == 6
constexpr Table<ASKS, 1, 1, 2, 3, 4, 5, 6> one_tap;
template <Asks ASKS>
constexpr Table<ASKS, 2, 1, 2, 3> two_taps;
template <Asks ASKS>
constexpr Table<ASKS, 3, 1, 2> three_taps;
#else
constexpr Table<ASKS, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12> one_tap;
template <Asks ASKS>
constexpr Table<ASKS, 2, 1, 2, 3, 4, 5, 6> two_taps;
template <Asks ASKS>
constexpr Table<ASKS, 3, 1, 2, 3, 4> three_taps;
#endif
template <Asks ASKS>
constexpr const Accumulate* by_taps[TAPS_TOGETHER] = {one_tap<ASKS>.of, two_taps<ASKS>.of, three_taps<ASKS>.of};

// sums (taps, Kt, TILE) += the block's share, of one tile of channels. `input` is where its first pixel would be.
// What it may ask for elsewhere it asks for in its first walk: there is enough to do while that comes.
void correlate_tile(const Problem& p, const Block& b, const float* input, const Steps& steps, Asks asks,
                    const Ahead& ahead, const float* gradient, float* sums) {
  const int parts = (p.learned + COLUMNS - 1) / COLUMNS;
  const Steps outputs = {int64_t(p.out_height) * p.out_width * p.learned, int64_t(p.out_width) * p.learned, p.learned};
  for (int tap = 0; tap < p.taps(); ++tap) {
    const int down = tap / p.kernel_w * p.dilation_h, right = tap % p.kernel_w * p.dilation_w;
    const Range rows = reached(b.top + down, b.rows, p.stride_h, p.height);
    const Range columns = reached(b.left + right, b.columns, p.stride_w, p.width);
    if (rows.size() == 0 || columns.size() == 0) continue;
    Walk walk = joined({b.images,
                        rows.size(),
                        columns.size(),
                        {steps.image, p.stride_h * steps.row, p.stride_w * steps.column},
                        outputs,
                        0,
                        ahead});
    if (asks != FURTHER_ON && 4 * walk.columns <= walk.images) walk = turned(walk);
    const float* x =
        input + (down + rows.begin * p.stride_h) * steps.row + (right + columns.begin * p.stride_w) * steps.column;
    const float* g = gradient + (b.row + rows.begin) * outputs.row + (b.column + columns.begin) * outputs.column;
    for (int part = 0; part < parts; ++part) {
      const int begin = part_begin(p.learned, parts, part), end = part_begin(p.learned, parts, part + 1);
      const Accumulate* add = asks == NOTHING      ? one_tap<NOTHING>.of
                              : asks == FURTHER_ON ? one_tap<FURTHER_ON>.of
                                                   : one_tap<ELSEWHERE>.of;
      if (asks == ELSEWHERE) asks = NOTHING;
      add[end - begin - 1](walk, x, g + begin, sums + (int64_t(tap) * p.learned + begin) * TILE, 0);
    }
  }
}

// Likewise, where taps share pixels; `gradient` has its halo. Each walk asks for its part.
void correlate_together(const Problem& p, const Block& b, const float* input, const Steps& steps, bool asks,
                        const Ahead& ahead, const float* gradient, float* sums) {
  const int halo = gradient_halo(p), width = p.out_width + 2 * halo;
  const int most = smaller(TAPS_TOGETHER, COLUMNS / p.learned), parts = (p.kernel_w + most - 1) / most;
  const Steps outputs = {int64_t(p.out_height) * width * p.learned, int64_t(width) * p.learned, p.learned};
  const int64_t apart = int64_t(p.learned) * TILE;
  for (int r = 0; r < p.kernel_h; ++r) {
    const int down = r * p.dilation_h;
    const Range rows = reached(b.top + down, b.rows, p.stride_h, p.height);
    if (rows.size() == 0) continue;
    Walk walk = {b.images,  rows.size(),
                 b.columns, {steps.image, p.stride_h * steps.row, steps.column},
                 outputs,   p.dilation_w * outputs.column,
                 ahead};
    if (4 * walk.columns <= walk.images) walk = turned(walk);
    const float* x = input + (down + rows.begin * p.stride_h) * steps.row;
    const float* g = gradient + (b.row + rows.begin) * outputs.row + (b.column + p.padding_w + halo) * outputs.column;
    for (int part = 0; part < parts; ++part) {
      const int begin = part_begin(p.kernel_w, parts, part), taps = part_begin(p.kernel_w, parts, part + 1) - begin;
      const Accumulate add = (asks ? by_taps<ELSEWHERE_IN_PARTS> : by_taps<NOTHING>)[taps - 1][p.learned - 1];
      walk.ahead.part = r * parts + part, walk.ahead.parts = p.kernel_h * parts;
      add(walk, x, g - begin * walk.tap, sums + (r * p.kernel_w + begin) * apart, apart);
    }
  }
}

void correlate(const Problem& p, const Item& item, const float* input, const float* gradient, float* scratch,
               float* sums) {
  const bool side_by_side = p.input_stride[1] == 1;
  const bool in_place = side_by_side && (p.taps() == 1 || (together(p) && p.input_stride[3] <= IN_PLACE_CHANNELS));
  const int64_t tile_sums = int64_t(p.taps()) * p.learned * TILE;
  const int64_t gradient_image = int64_t(p.out_height) * (p.out_width + 2 * gradient_halo(p)) * p.learned;
  const Steps there = {p.input_stride[0], p.input_stride[2], p.input_stride[3]};
  const int images = block_images(p), last = item.first_image + item.images;
  for (int n = item.first_image; n < last; n += images, gradient += images * gradient_image) {
    for (int row = 0; row < p.out_height; row += block_rows(p)) {
      for (int column = 0; column < all_columns(p); column += block_columns(p)) {
        const Block b = block_at(p, n, smaller(images, last - n), row, column);
        float* to = sums;
        for (int c = 0; c < item.channels; c += TILE, to += tile_sums) {
          const int channels = smaller(TILE, item.channels);
          const float* from = input + (item.first_channel + smaller(c, item.channels - channels)) * p.input_stride[1];
          const float* pixels = from + n * there.image + b.top * there.row + b.left * there.column;
          Steps steps = there;
          const bool packed = !in_place || channels < TILE;
          if (packed) {
            pack(p, b, channels, from, scratch);
            pixels = scratch;
            steps = {int64_t(b.input_rows) * b.input_columns * TILE, int64_t(b.input_columns) * TILE, TILE};
          }
          // The rows that follow, perhaps of the next image: most often they are the next block's.
          const float* next =
              from + (n + b.images - 1) * there.image + (b.top + b.input_rows) * there.row + b.left * there.column;
          const Ahead ahead = {next, there, 0, 1};
          if (together(p)) {
            correlate_together(p, b, pixels, steps, side_by_side, ahead, gradient, to);
          } else {
            const Asks asks = !packed ? FURTHER_ON : side_by_side ? ELSEWHERE : NOTHING;
            correlate_tile(p, b, pixels, steps, asks, ahead, gradient, to);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace rwn::cpu
