// The whole computation: the learned filters' gradient made dense, items shared among threads, their sums added.
#include "weight_grad.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

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

int block_floats() {
  static const int floats = [] {
    long bytes = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    return (bytes > 0 ? int(bytes) : 32 * 1024) / int(sizeof(float)) * 5 / 6;
  }();
  return floats;
}

const Code& code_for(int channels, bool depthwise) {
  const Code* const* code = codes();
  while ((depthwise ? (*code)->depthwise_tile : (*code)->tile) > channels && code[1] && code[2]) ++code;
  return **code;
}

namespace {

// So many items keep a large machine busy; a split costs a sum more, and one of all channels a larger one: its sums are
// at most so many, which a second level cache holds beside the images.
constexpr int ITEMS = 64, LEAST_WIDE_ITEMS = 16, WIDE_SUMS = 16384;
// So much of the dense gradient is made before it is used, where that can be: the first level cache still holds it.
constexpr int64_t NEAR_FLOATS = 4096;
// Fewer numbers are added up sooner than threads are woken.
constexpr int64_t SHARED_SUMS = 16384;
// Of fewer outputs than so many, the sums of a split cost as much as they do; few sums stay in the cache.
constexpr int LEAST_OUTPUTS = 256, LEAST_OUTPUTS_OF_FEW = 64;

// Of all channels, no more items than this machine needs.
int wide_items() {
  static const int processors = int(std::thread::hardware_concurrency());
  return std::clamp(processors, LEAST_WIDE_ITEMS, ITEMS);
}

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

// Pixels are asked for so many pixels before they are read, where they lie so many floats apart: then most of what lies
// between is skipped, and no machine guesses that.
constexpr int GATHER_AHEAD = 64, FAR = 32;

// Some channels, and where they lie in (N, C, rows, columns).
struct Channels {
  const int64_t* of;
  int count;
  const int64_t* stride;
};

// Dense pixels, with columns of zeros on either side.
struct Dense {
  int rows, columns, halo, pitch;

  int64_t row() const { return int64_t(columns + 2 * halo) * pitch; }
  int64_t image() const { return rows * row(); }
};

// (rows, columns, pitch), of one image: these channels, what is left of the pitch zero.
void gather_image(const Channels& c, const Dense& d, const float* image, float* to) {
  const int64_t ahead = GATHER_AHEAD * c.stride[3] + c.of[0] * c.stride[1];
  for (int row = 0; row < d.rows; ++row) {
    const float* from = image + row * c.stride[2];
    to = std::fill_n(to, d.halo * d.pitch, 0.0f);
    for (int column = 0; column < d.columns; ++column, from += c.stride[3], to += d.pitch) {
      if (c.stride[3] >= FAR) __builtin_prefetch(from + ahead);
      for (int k = 0; k < c.count; ++k) to[k] = from[c.of[k] * c.stride[1]];
      for (int k = c.count; k < d.pitch; ++k) to[k] = 0;
    }
    to = std::fill_n(to, d.halo * d.pitch, 0.0f);
  }
}

Floats gather(const Problem& p, const Channels& c, const Dense& d, const float* from, int threads) {
  Floats dense = allocate(p.batch * d.image());
  run(threads, p.batch,
      [&](int64_t n, int) { gather_image(c, d, from + n * c.stride[0], dense.get() + n * d.image()); });
  return dense;
}

// Numbers so many are added up before their sum is added to others: one sum of them all would lose digits.
constexpr int SUMMED = 512;
// A cache line: threads that write to the same one wait for each other.
constexpr int LINE = 16;

// The learned filters' gradient, made dense image by image, and on the way what their bias' gradient is the sum of.
class Gradient {
 public:
  Gradient(const Channels& learned, const Dense& dense, const float* from, int batch, bool bias)
      : learned_(learned), dense_(dense), from_(from), batch_(batch), step_(divide_up(2 * dense.pitch, LINE) * LINE) {
    if (bias) sums_ = allocate(batch * step_);
  }

  int64_t image() const { return dense_.image(); }

  void gather(int64_t n, float* to) const {
    gather_image(learned_, dense_, from_ + n * learned_.stride[0], to);
    if (sums_) sum(to, sums_.get() + n * step_);
  }

  // (pitch), when all have been gathered.
  void bias(float* to) const {
    for (int k = 0; k < dense_.pitch; ++k) {
      double total = 0;
      for (int n = 0; n < batch_; ++n) total += sums_[n * step_ + k];
      to[k] = float(total);
    }
  }

 private:
  // Zeros around the pixels do not matter. Behind the sum is room for that of some pixels.
  void sum(const float* g, float* sum) const {
    const float* end = g + image();
    float* some = sum + dense_.pitch;
    std::fill_n(sum, dense_.pitch, 0.0f);
    while (g < end) {
      std::fill_n(some, dense_.pitch, 0.0f);
      for (const float* stop = std::min(end, g + SUMMED * dense_.pitch); g < stop; g += dense_.pitch) {
        for (int k = 0; k < dense_.pitch; ++k) some[k] += g[k];
      }
      for (int k = 0; k < dense_.pitch; ++k) sum[k] += some[k];
    }
  }

  const Channels& learned_;
  const Dense& dense_;
  const float* from_;
  int batch_;
  int64_t step_;
  Floats sums_;
};

// How the work is cut: channels in tiles, and these or all of them (`wide`) of some images are an item. Each channel
// has the sums of so many filters.
struct Cut {
  int channels, tile, filters;
  bool wide;
  int least_outputs;  // of a split

  int64_t tiles() const { return divide_up(channels, tile); }
  int64_t tiles_each() const { return wide ? tiles() : 1; }
  int64_t shares() const { return tiles() / tiles_each(); }
  int64_t splits(int batch, int64_t outputs) const {
    const int64_t most = std::min<int64_t>(batch, batch * outputs / least_outputs);
    return std::clamp<int64_t>((wide ? wide_items() : ITEMS) / shares(), 1, std::max<int64_t>(most, 1));
  }
  // The last tile ends where the channels do, and so may share some with the one before.
  int first_channel(int64_t i) const { return std::max(0, std::min(int(i) * tile, channels - tile)); }
};

// All channels together where there are enough images for that: memory is then read in the order it is in.
Cut cut_of(const Problem& p, const Code& code) {
  const int64_t outputs = int64_t(p.batch) * p.out_height * p.out_width;
  const bool few = int64_t(p.taps()) * p.learned * p.channels <= WIDE_SUMS;
  const bool wide =
      p.batch >= wide_items() && (p.taps() == 1 || (few && outputs >= wide_items() * LEAST_OUTPUTS_OF_FEW));
  return {p.channels, code.tile, p.learned, wide, wide && few ? LEAST_OUTPUTS_OF_FEW : LEAST_OUTPUTS};
}

// Adds up what `correlate(item, thread, to)` adds to `to`, (tiles, taps, filters, tile), and writes it to the result.
template <class Correlate>
void sum(const Problem& p, const Cut& cut, float* result, int threads, const Correlate& correlate) {
  const int64_t tiles = cut.tiles(), tiles_each = cut.tiles_each(),
                splits = cut.splits(p.batch, int64_t(p.out_height) * p.out_width);
  const int64_t sums = int64_t(p.taps()) * cut.filters * cut.tile;
  const Floats partial = allocate(splits * tiles * sums);
  run(threads, cut.shares() * splits, [&](int64_t i, int thread) {
    // A tile's splits follow each other: most often one thread computes them all and adds them up.
    const int64_t tile = i / splits * tiles_each, split = i % splits;
    const int first = int(p.batch * split / splits), end = int(p.batch * (split + 1) / splits);
    const Item item = {first, end - first, cut.first_channel(tile),
                       cut.wide ? cut.channels : std::min(cut.tile, cut.channels)};
    float* to = partial.get() + (split * tiles + tile) * sums;
    std::fill_n(to, tiles_each * sums, 0.0f);
    correlate(item, thread, to);
  });

  const int64_t step = p.result_stride[p.depthwise ? 0 : 1];
  run(splits * tiles * sums < SHARED_SUMS ? 1 : threads, tiles, [&](int64_t tile, int) {
    float* total = partial.get() + tile * sums;
    for (int64_t split = 1; split < splits; ++split) {
      const float* other = total + split * tiles * sums;
      for (int64_t i = 0; i < sums; ++i) total[i] += other[i];
    }
    const int channel = cut.first_channel(tile), end = std::min(channel + cut.tile, cut.channels) - channel;
    const int begin = int(tile * cut.tile) - channel;  // what lies before is the tile before's
    for (int tap = 0; tap < p.taps(); ++tap) {
      for (int k = 0; k < cut.filters; ++k, total += cut.tile) {
        float* to = result + k * p.result_stride[0] + channel * step + tap / p.kernel_w * p.result_stride[2] +
                    tap % p.kernel_w * p.result_stride[3];
        for (int c = begin; c < end; ++c) to[c * step] = total[c];
      }
    }
  });
}

// Each channel beside its filter; read where they lie if a register of them can be.
void depthwise_weight_grad(const Code& code, const Problem& p, const float* input, const float* grad_output,
                           const int64_t* filters, float* result, int threads) {
  const int pitch = std::max(p.learned, code.depthwise_tile);
  const auto steps = [&](const int64_t* stride) { return Steps{stride[0], stride[2], stride[3]}; };
  const auto steps_of = [](const Dense& d) { return Steps{d.image(), d.row(), d.pitch}; };
  Floats pixels, gradient;
  Steps from = steps(p.input_stride), outputs = steps(p.gradient_stride);
  if (p.learned < pitch || p.input_stride[1] != 1) {
    std::vector<int64_t> all(p.learned);
    std::iota(all.begin(), all.end(), 0);
    const Channels channels = {all.data(), p.learned, p.input_stride};
    const Dense dense = {p.height, p.width, 0, pitch};
    pixels = gather(p, channels, dense, input, threads);
    input = pixels.get(), from = steps_of(dense);
  }
  if (p.learned < pitch || p.gradient_stride[1] != 1 || filters[p.learned - 1] - filters[0] >= p.learned) {
    const Channels channels = {filters, p.learned, p.gradient_stride};
    const Dense dense = {p.out_height, p.out_width, 0, pitch};
    gradient = gather(p, channels, dense, grad_output, threads);
    grad_output = gradient.get(), outputs = steps_of(dense);
  } else {
    grad_output += filters[0];
  }
  const Cut cut = {p.learned, code.depthwise_tile, 1, p.batch >= wide_items(), LEAST_OUTPUTS};
  sum(p, cut, result, threads, [&](const Item& item, int, float* to) {
    const int channel = item.first_channel;
    code.correlate_depthwise(p, item, input + channel, from, grad_output + channel, outputs, to);
  });
}

}  // namespace

void weight_grad(const Code& code, const Problem& p, const float* input, const float* grad_output,
                 const int64_t* filters, float* result, float* bias, int threads) {
  if (p.depthwise) return depthwise_weight_grad(code, p, input, grad_output, filters, result, threads);
  const Channels learned = {filters, p.learned, p.gradient_stride};
  const Dense dense = {p.out_height, p.out_width, code.gradient_halo(p), p.learned};
  const Gradient gradient(learned, dense, grad_output, p.batch, bias != nullptr);
  const int64_t image = gradient.image(), scratch = code.scratch_floats(p);
  const Floats scratches = allocate(threads * scratch);
  const Cut cut = cut_of(p, code);
  if (cut.wide) {
    // Its images' gradient is all that an item needs.
    const int images = int(std::clamp<int64_t>(NEAR_FLOATS / image, 1, p.batch));
    const Floats near = allocate(threads * images * image);
    sum(p, cut, result, threads, [&](const Item& item, int thread, float* to) {
      float* own = near.get() + thread * images * image;
      for (int n = item.first_image, end = n + item.images; n < end; n += images) {
        const Item some = {n, std::min(images, end - n), item.first_channel, item.channels};
        for (int i = 0; i < some.images; ++i) gradient.gather(n + i, own + i * image);
        code.correlate(p, some, input, own, scratches.get() + thread * scratch, to);
      }
    });
  } else {
    const Floats all = allocate(p.batch * image);
    run(threads, p.batch, [&](int64_t n, int) { gradient.gather(n, all.get() + n * image); });
    sum(p, cut, result, threads, [&](const Item& item, int thread, float* to) {
      code.correlate(p, item, input, all.get() + item.first_image * image, scratches.get() + thread * scratch, to);
    });
  }
  if (bias) gradient.bias(bias);
}

}  // namespace rwn::cpu
