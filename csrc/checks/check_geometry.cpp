// The kernels' index arithmetic against loop nests, exhaustively over small problems. No GPU, no CUDA.
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "../numbers.h"
#include "../plan.h"
#include "cases.h"

namespace rwn::checks {

int checked = 0;
void expect(bool right, const char* what) {
  ++checked;
  if (right) return;
  std::printf("FAILED: %s\n0 passed, 1 failed\n", what);
  std::exit(1);
}

void check_dividers() {
  for (int d = 1; d < 600; ++d) {
    const Divider by = Divider::of(d);
    for (int64_t n : {0, 1, d - 1, d, d + 1, 12345, 2147483647, 2147483646, 2147483647 / d * d, 2147483647 / d * d - 1}) {
      expect(by.quotient(int(n)) == n / d && by.remainder(int(n)) == n % d, "division");
    }
    for (int n = 0; n < 4000; ++n) expect(by.quotient(n) == n / d, "division");
  }
}

void check_halves() {
  for (int bits = 0; bits < 65536; ++bits) {
    const float half = to_float(f16{uint16_t(bits)}), brain = to_float(bf16{uint16_t(bits)});
    const bool nan = (bits & 0x7fff) > 0x7c00;
    expect(nan ? half != half : Rounded<f16>::of(half).bits == bits, "float16 there and back");
    expect((bits & 0x7fff) > 0x7f80 ? brain != brain : Rounded<bf16>::of(brain).bits == bits, "bfloat16 there and back");
  }
}

// Every tap of every pixel reads from the slab exactly the gradient that the definition multiplies it with.
void check_taps(const Case& c, const Plan& plan) {
  const Problem& p = plan.problem;
  const Task& task = plan.task;
  const Geometry& g = task.geometry;
  int covered = 0;
  for (int split = 0; split < task.splits; ++split) {
    const int begin = split_begin(split, task.splits, task.tiles), end = split_begin(split + 1, task.splits, task.tiles);
    expect(begin < end && begin == covered, "splits share out the tiles");
    covered = end;
    for (int tile = begin; tile < end; tile += task.chunk_tiles) {
      const int first = tile * kTilePixels;
      const int past = std::min(std::min(tile + task.chunk_tiles, end) * kTilePixels, g.pixels);
      const int origin = g.position(first), span = g.span(first, past - 1);
      expect(span <= task.plane, "the slab holds its span");
      for (int v = first; v < past; ++v) {
        const Pixel at = g.pixel(v);
        expect((at.image * g.height + at.row) * g.width_even + at.column == v && at.column < g.width_even, "pixel");
        for (int column = 0; column < g.columns; ++column) {
          const int taps = p.kernel_h * p.kernel_w, r = column % taps / p.kernel_w, s = column % p.kernel_w;
          const int word = g.position(v) - origin + g.shift(column, column / taps, task.plane);
          expect(word >= 0 && word < span && (v % 2 == 1 || word + 1 < span), "inside the slab");
          if (at.column >= p.width) continue;
          const Source from = g.source(origin + word);
          const int y = at.row + p.padding_h - r * p.dilation_h, x = at.column + p.padding_w - s * p.dilation_w;
          const bool inside = y >= 0 && x >= 0 && y % p.stride_h == 0 && x % p.stride_w == 0 &&
                              y / p.stride_h < p.out_height && x / p.stride_w < p.out_width;
          expect(from.inside == inside, "a value or a zero");
          if (inside) {
            expect(from.image == at.image && from.row == y / p.stride_h && from.column == x / p.stride_w, "its source");
          }
        }
      }
    }
  }
  expect(covered == task.tiles, "all tiles");
  (void)c;
}

void check_shared_memory() {
  std::set<int> places;
  for (int row = 0; row < kTilePixels; ++row) {
    for (int chunk = 0; chunk < 16; ++chunk) {
      const int offset = x_offset(row, chunk);
      expect(offset % 16 == 0 && offset < 2 * kTilePixels * 128 && places.insert(offset).second, "X: a place each");
      std::set<int> banks;
      for (int i = 0; i < 8; ++i) banks.insert(x_offset(row / 8 * 8 + i, chunk) / 16 % 8);
      expect(banks.size() == 8, "X: 8 pixels of a chunk in 8 bank groups");
    }
  }
  places.clear();
  for (int column = 0; column < 144; ++column) {
    for (int pixel = 0; pixel < kTilePixels; ++pixel) {
      const int offset = unfolded_offset(column, pixel);
      expect(offset >= 0 && offset < 144 * kTilePixels * 2 && places.insert(offset).second, "B: a place each");
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    expect(unfolded_offset(lane / 4, lane % 4 * 2) == lane * 4, "B: a word each");
  }
}

int main() {
  check_dividers();
  check_halves();
  check_shared_memory();
  for (const Case& c : small_cases()) {
    if (c.depthwise) continue;
    const Problem problem = problem_of(c);
    for (const int multiprocessors : {1, 5, 132}) {
      const Device device{90, multiprocessors, 99 * 1024, 200 * 1024, 4000};
      for (const Kernel kernel : {Kernel::ffma, Kernel::mma, Kernel::wgmma}) {
        if (obstacle(problem, device, kernel).empty()) check_taps(c, make_plan(problem, device, kernel));
      }
    }
  }
  std::printf("%d passed, 0 failed\n", checked);
  return 0;
}

}  // namespace rwn::checks

int main() { return rwn::checks::main(); }
