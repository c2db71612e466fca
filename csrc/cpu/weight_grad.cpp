// The whole computation: the learned filters' gradient made dense, items shared among threads, their sums added.
#include "weight_grad.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>

#include "threads.h"

namespace rwn::cpu {

extern const Code baseline;
#ifdef RWN_X86
extern const Code avx2, avx512;
#endif

const Code* const* codes() {
  static const std::array<const Code*, 4> found = [] {
    std::array<const Code*, 4> able{};
    int count = 0;
#ifdef RWN_X86
    if (__builtin_cpu_supports("avx512f")) able[count++] = &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) able[count++] = &avx2;
#endif
    able[count] = &baseline;
    return able;
  }();
  return found.data();
}

namespace {

// So many items keep a large machine busy; a split costs a sum more, and one of all channels a larger one.
constexpr int ITEMS = 64, WIDE_ITEMS = 16;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats allocate(int64_t floats) {
  const size_t bytes = (std::max<int64_t>(floats, 1) * sizeof(float) + 63) / 64 * 64;
  Floats memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where a tile begins: the last one ends where the channels do, and so may share some with the one before.
int first_channel(const Problem& p, int tile_size, int64_t tile) {
  return std::max(0, std::min(int(tile) * tile_size, p.channels - tile_size));
}

// Pixels of the gradient are asked for so many pixels before they are read, where they lie so many floats apart: then
// most of what lies between is skipped, and no machine guesses that.
constexpr int AHEAD = 64, FAR = 32;

// (N, P, Q, Kt), of one image.
void gather_image(const Problem& p, int n, const float* grad_output, const int64_t* filters, float* to) {
  const int64_t ahead = AHEAD * p.gradient_stride[3] + filters[0] * p.gradient_stride[1];
  for (int row = 0; row < p.out_height; ++row) {
    const float* from = grad_output + n * p.gradient_stride[0] + row * p.gradient_stride[2];
    for (int column = 0; column < p.out_width; ++column, from += p.gradient_stride[3], to += p.learned) {
      if (p.gradient_stride[3] >= FAR) __builtin_prefetch(from + ahead);
      for (int k = 0; k < p.learned; ++k) to[k] = from[filters[k] * p.gradient_stride[1]];
    }
  }
}

}  // namespace

void weight_grad(const Code& code, const Problem& p, const float* input, const float* grad_output,
                 const int64_t* filters, float* result, int threads) {
  const int64_t image = int64_t(p.out_height) * p.out_width * p.learned;
  const Floats gradient = allocate(p.batch * image);
  run(threads, p.batch,
      [&](int64_t n, int) { gather_image(p, int(n), grad_output, filters, gradient.get() + n * image); });

  // With one tap, an item is all channels of some images where there are enough of these: it reads memory in order.
  const int64_t tiles = divide_up(p.channels, code.tile);
  const bool wide = p.taps() == 1 && p.batch >= WIDE_ITEMS;
  const int64_t tiles_each = wide ? tiles : 1, shares = tiles / tiles_each;
  const int64_t splits = std::clamp<int64_t>((wide ? WIDE_ITEMS : ITEMS) / shares, 1, std::max(p.batch, 1));
  const int64_t sums = int64_t(p.taps()) * p.learned * code.tile, scratch = code.scratch_floats(p);
  const Floats partial = allocate(splits * tiles * sums), scratches = allocate(threads * scratch);
  run(threads, shares * splits, [&](int64_t i, int thread) {
    // Tiles of the same images follow each other: neighbouring channels share what the caches fetch.
    const int64_t tile = i % shares * tiles_each, split = i / shares;
    const int first = int(p.batch * split / splits), end = int(p.batch * (split + 1) / splits);
    const int channel = first_channel(p, code.tile, tile);
    const Item item = {first, end - first, channel, wide ? p.channels : std::min(code.tile, p.channels)};
    float* to = partial.get() + (split * tiles + tile) * sums;
    std::fill_n(to, tiles_each * sums, 0.0f);
    code.correlate(p, item, input, gradient.get(), scratches.get() + thread * scratch, to);
  });

  run(threads, tiles, [&](int64_t tile, int) {
    float* total = partial.get() + tile * sums;
    for (int64_t split = 1; split < splits; ++split) {
      const float* other = total + split * tiles * sums;
      for (int64_t i = 0; i < sums; ++i) total[i] += other[i];
    }
    const int channel = first_channel(p, code.tile, tile), end = std::min(channel + code.tile, p.channels) - channel;
    const int begin = int(tile * code.tile) - channel;  // what lies before is the tile before's
    for (int tap = 0; tap < p.taps(); ++tap) {
      for (int k = 0; k < p.learned; ++k, total += code.tile) {
        float* to = result + k * p.result_stride[0] + channel * p.result_stride[1] +
                    tap / p.kernel_w * p.result_stride[2] + tap % p.kernel_w * p.result_stride[3];
        for (int c = begin; c < end; ++c) to[c * p.result_stride[1]] = total[c];
      }
    }
  });
}

}  // namespace rwn::cpu
