// The host planner: which kernel, which tile, how many splits, how much memory. No CUDA here: it runs anywhere.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace rwn {
namespace {

constexpr int kSlabBytes = 32 * 1024;  // what the slab is given before it costs a second block its place
constexpr int kReservedBytes = 1024;   // of shared memory, that CUDA takes for each block

int ceil_div(int64_t n, int64_t d) { return int((n + d - 1) / d); }

template <int count>
int round_up_to_one_of(const int (&sizes)[count], int wanted) {
  return *std::find_if(std::begin(sizes), std::end(sizes), [&](int size) { return size >= wanted; });
}

template <int count>
constexpr int largest(const int (&sizes)[count]) {
  return sizes[count - 1];
}

// A row pitch of the slab at which the rows of a filter's taps fall into different banks: two neighbouring rows should
// lie 9 to 11 or 21 to 23 words apart (mod 32), as a fragment's 8 columns and 4 pixel pairs touch 9 words of each.
int slab_pitch(int width, int rows) {
  if (rows == 1) return width;
  int pitch = width;
  while (!((pitch % 32 >= 9 && pitch % 32 <= 11) || (pitch % 32 >= 21 && pitch % 32 <= 23))) ++pitch;
  return pitch;
}

Geometry make_geometry(const Problem& p) {
  Geometry g{};
  g.batch = p.batch, g.channels = p.channels, g.height = p.height, g.width = p.width;
  g.out_height = p.out_height, g.out_width = p.out_width, g.learned = p.learned;
  g.kernel_h = p.kernel_h, g.kernel_w = p.kernel_w;
  g.dilation_h = p.dilation_h, g.dilation_w = p.dilation_w, g.stride_h = p.stride_h, g.stride_w = p.stride_w;
  g.width_even = p.width + p.width % 2;
  g.padded_height = p.height + (p.kernel_h - 1) * p.dilation_h;
  g.pitch = slab_pitch(g.width_even + (p.kernel_w - 1) * p.dilation_w, p.kernel_h);
  g.origin_h = (p.kernel_h - 1) * p.dilation_h - p.padding_h;
  g.origin_w = (p.kernel_w - 1) * p.dilation_w - p.padding_w;
  g.pixels = p.batch * p.height * g.width_even;
  g.columns = p.learned * p.kernel_h * p.kernel_w;
  g.by_width = Divider::of(g.width_even), g.by_height = Divider::of(g.height);
  g.by_pitch = Divider::of(g.pitch), g.by_padded_height = Divider::of(g.padded_height);
  g.by_stride_h = Divider::of(p.stride_h), g.by_stride_w = Divider::of(p.stride_w);
  g.by_taps = Divider::of(p.kernel_h * p.kernel_w), g.by_kernel_w = Divider::of(p.kernel_w);
  return g;
}

// For depthwise kernels rows are those of the output, and nothing is padded.
Geometry make_depthwise_geometry(const Problem& p) {
  Geometry g = make_geometry(p);
  g.by_height = Divider::of(p.out_height);
  g.origin_h = p.padding_h, g.origin_w = p.padding_w;
  return g;
}

// No fewer words than any `tiles` tiles in a row need, wherever they begin.
int64_t slab_words(const Geometry& g, int tiles) {
  const int64_t pixels = std::min<int64_t>(int64_t(tiles) * kTilePixels, g.pixels);
  const int64_t rows = std::min<int64_t>(ceil_div(pixels - 1, g.width_even), int64_t(g.batch) * g.height - 1);
  const int64_t images = std::min<int64_t>(ceil_div(pixels - 1, int64_t(g.width_even) * g.height), g.batch - 1);
  return pixels + rows * (g.pitch - g.width_even) + images * (g.padded_height - g.height) * g.pitch +
         int64_t(g.kernel_h - 1) * g.dilation_h * g.pitch + int64_t(g.kernel_w - 1) * g.dilation_w;
}

// Filters that one tile of columns can touch.
int filters_in_tile(const Geometry& g, int tile_columns, int column_tiles) {
  const int taps = g.kernel_h * g.kernel_w;
  int most = 0;
  for (int tile = 0; tile < column_tiles; ++tile) {
    const int first = tile * tile_columns, last = std::min(first + tile_columns, g.columns) - 1;
    most = std::max(most, last / taps - first / taps + 1);
  }
  return most;
}

struct Shape {  // what differs between the matrix-product kernels
  int tile_channels, tile_columns, ring_bytes, threads, blocks_per_multiprocessor;
};

// Bytes read for one position of `filters` neighbouring filters: whole sectors of 32, where filters lie side by side.
double gradient_bytes(const Problem& p, int filters) {
  const int64_t wanted = int64_t(filters) * bytes_of(p.type);
  if (p.gradient_stride[1] != 1) return double(wanted);
  return double(std::min(ceil_div(wanted, 32) * int64_t(32), std::max(wanted, p.gradient_stride[3] * bytes_of(p.type))));
}

// The partial tiles, written and read, and the result.
double result_bytes_of(const Plan& plan) {
  const Problem& p = plan.problem;
  const int64_t results = int64_t(p.learned) * (p.depthwise ? 1 : p.channels) * p.kernel_h * p.kernel_w;
  return double(plan.workspace) * 4 * 2 + double(results) * bytes_of(p.out_type);
}

// What a multiprocessor is expected to multiply and add; a load from shared memory a product where X comes singly.
double products_a_nanosecond(const Plan& plan) {
  if (plan.kernel == Kernel::wgmma) return 2500;
  if (plan.kernel == Kernel::mma) return 900;
  const bool narrow = plan.device.capability == 75 || plan.device.capability == 80;  // 64 lanes, later 128
  return plan.vector == 1 || narrow ? 45 : 90;
}

// Splits, memory and time for one shape; false where the slab does not fit.
bool complete(Plan& plan, const Shape& shape) {
  const Problem& p = plan.problem;
  const Device& device = plan.device;
  Task& task = plan.task;
  const Geometry& g = task.geometry;
  task.tile_channels = shape.tile_channels, task.tile_columns = shape.tile_columns;
  task.channel_tiles = ceil_div(g.channels, shape.tile_channels);
  task.column_tiles = ceil_div(g.columns, shape.tile_columns);
  task.slab_filters = filters_in_tile(g, shape.tile_columns, task.column_tiles);
  task.slab_offset = shape.ring_bytes;
  const int result_bytes = shape.tile_columns * (shape.tile_channels + kTilePad) * 4 + shape.threads * 16;

  // As many tiles a filling as its share of the memory allows, and one in any case.
  task.chunk_tiles = 16;
  const auto slab_bytes = [&] { return slab_words(g, task.chunk_tiles) * 4 * task.slab_filters; };
  while (task.chunk_tiles > 1 && slab_bytes() > kSlabBytes) --task.chunk_tiles;
  const int64_t bytes = std::max<int64_t>(shape.ring_bytes + slab_bytes(), result_bytes);
  if (bytes > device.block_memory) return false;
  task.plane = int(slab_words(g, task.chunk_tiles));
  plan.shared_memory = int(bytes);
  plan.threads = shape.threads;
  plan.blocks_per_multiprocessor = std::min<int>(
      shape.blocks_per_multiprocessor, device.multiprocessor_memory / (plan.shared_memory + kReservedBytes));

  // All blocks of a plan with splits are resident at once. Below 4 tiles a block spends its time on starting.
  const int result_tiles = task.channel_tiles * task.column_tiles;
  const int resident = device.multiprocessors * plan.blocks_per_multiprocessor;
  task.tiles = ceil_div(g.pixels, kTilePixels);
  task.splits = std::clamp(std::min(resident / result_tiles, task.tiles / 4), 1, 65535);
  task.chunk_tiles = std::min(task.chunk_tiles, ceil_div(task.tiles, task.splits));
  plan.blocks = result_tiles * task.splits;
  plan.workspace = task.splits == 1 ? 0 : int64_t(result_tiles) * task.splits * shape.tile_columns * shape.tile_channels;
  plan.counters = task.splits == 1 ? 0 : result_tiles;

  // What all blocks read and write, each counted for itself: X by those of every tile of columns, the gradient by those
  // of every tile of channels, and of it the halo by those of two neighbouring splits.
  const double halo = double(task.plane) / (task.chunk_tiles * kTilePixels);
  const double values = double(g.out_height) * g.out_width / (double(g.height) * g.width_even);  // a pixel and filter
  const double tile_bytes = kTilePixels * (double(std::min(shape.tile_channels, g.channels)) * bytes_of(p.type) +
                                           halo * values * gradient_bytes(p, task.slab_filters));
  const double tile_products = double(kTilePixels) * shape.tile_channels * shape.tile_columns;
  plan.bytes = double(task.tiles) * result_tiles * tile_bytes + result_bytes_of(plan);
  plan.flops = double(task.tiles) * result_tiles * tile_products * 2;

  // The most loaded multiprocessor's time, bounded by its share of the bandwidth or by its arithmetic, then the
  // reduction through L2 (taken as twice as fast as memory), and what starting and stopping costs.
  const double share = device.bandwidth / device.multiprocessors;
  const double tile_nanoseconds = std::max(tile_bytes / share, tile_products / products_a_nanosecond(plan));
  const double rounds = double(plan.blocks) / device.multiprocessors;
  const double load = task.splits > 1 || rounds <= plan.blocks_per_multiprocessor
                          ? std::ceil(rounds)
                          : std::max(rounds, std::floor(rounds) + 0.5);
  const double reduction = task.splits == 1 ? 0 : 1500 + double(plan.workspace) * 4 / device.bandwidth;
  plan.microseconds =
      (2500 + load * ceil_div(task.tiles, task.splits) * tile_nanoseconds + reduction) / 1000;
  return true;
}

int log2_lanes(const Problem& p, int filters) {
  if (p.gradient_stride[1] != 1) return 0;
  int log = 0;
  while (log < 5 && (1 << log) < filters) ++log;
  return log;
}

bool channels_last(const Problem& p) { return p.x_stride[1] == 1; }

// Strides of the input's pixels that are whole multiples of `elements`.
bool strides_divide_by(const Problem& p, int elements) {
  return p.x_stride[0] % elements == 0 && p.x_stride[2] % elements == 0 && p.x_stride[3] % elements == 0;
}

void plan_gemm(Plan& plan) {
  const Problem& p = plan.problem;
  Task& task = plan.task;
  const int columns = task.geometry.columns;
  Plan best{};
  best.microseconds = std::numeric_limits<double>::infinity();
  const auto consider = [&](const Shape& shape) {
    Plan candidate = plan;
    if (complete(candidate, shape) && candidate.microseconds < best.microseconds) best = candidate;
  };
  if (plan.kernel == Kernel::ffma) {
    const int most = largest(kFfmaWidths);
    plan.width = round_up_to_one_of(kFfmaWidths, ceil_div(columns, ceil_div(columns, most)));
    const bool wide = channels_last(p) && p.channels % 4 == 0 && strides_divide_by(p, 4) && p.aligned;
    plan.vector = wide ? 4 : 1;
    consider({32 * plan.vector, plan.width, 0, kFfmaThreads, 1});
  } else {
    const bool wgmma = plan.kernel == Kernel::wgmma;
    const int most = largest(kMmaWidths) * 8;
    const int wanted = ceil_div(ceil_div(columns, ceil_div(columns, most)), 8);
    plan.width = p.normed ? round_up_to_one_of(kNormedWidths, wanted)
                 : wgmma  ? round_up_to_one_of(kWgmmaWidths, wanted)
                          : round_up_to_one_of(kMmaWidths, wanted);
    plan.vector = 8;
    for (const int tile_channels : {64, 128}) {
      if (tile_channels == 128 && p.channels <= 64) continue;
      // wgmma keeps two stages of the unfolded gradient beside X's ring.
      const int unfolded = wgmma ? 2 * plan.width * 8 * kTilePixels * 2 + 1024 : 0;
      consider({tile_channels, plan.width * 8, kStages * tile_channels * kTilePixels * 2 + unfolded, kGemmThreads, 2});
    }
  }
  if (std::isinf(best.microseconds)) throw std::invalid_argument("the gradient's slab does not fit");
  plan = best;
  task.slab_lanes_log = log2_lanes(p, task.slab_filters);
}

void plan_depthwise(Plan& plan) {
  const Problem& p = plan.problem;
  const Device& device = plan.device;
  Task& task = plan.task;
  plan.width = p.kernel_h;
  plan.vector = p.type != Type::float32 && channels_last(p) && p.channels % 2 == 0 && strides_divide_by(p, 2) ? 2 : 1;
  plan.threads = kFfmaThreads;
  plan.blocks_per_multiprocessor = 1;
  task.tile_channels = 32 * plan.vector, task.tile_columns = p.kernel_h * p.kernel_w;
  task.channel_tiles = ceil_div(p.channels, task.tile_channels), task.column_tiles = 1;
  task.tiles = p.batch * p.out_height;
  // At least 8 rows a block, one a warp.
  task.splits = std::clamp(std::min(device.multiprocessors / task.channel_tiles, task.tiles / 8), 1, 65535);
  plan.shared_memory = task.tile_columns * (task.tile_channels + kTilePad) * 4 + plan.threads * 16;
  plan.blocks = task.channel_tiles * task.splits;
  plan.workspace = task.splits == 1 ? 0 : int64_t(plan.blocks) * task.tile_columns * task.tile_channels;
  plan.counters = task.splits == 1 ? 0 : task.channel_tiles;
  const double outputs = double(p.batch) * p.out_height * p.out_width;
  const double inputs = double(p.batch) * p.height * p.width;
  plan.bytes = inputs * p.channels * bytes_of(p.type) +
               outputs * task.channel_tiles * gradient_bytes(p, std::min(task.tile_channels, p.learned)) +
               result_bytes_of(plan);
  const double products = outputs * task.channel_tiles * task.tile_channels * task.tile_columns;
  plan.flops = 2 * products;
  // A block has a multiprocessor to itself, whose loads go along with every fourth product: each input value is read
  // again from L1 for every row of the filter.
  const double busy = std::min(1.0, double(plan.blocks) / device.multiprocessors);
  const double work = std::max(2 * plan.bytes / device.bandwidth,
                               products / products_a_nanosecond(plan) / device.multiprocessors);
  plan.microseconds = (4000 + work / busy) / 1000;
}

std::string too_large(const Problem& p) {
  const Geometry g = make_geometry(p);
  const int64_t most = std::numeric_limits<int>::max();
  const auto product = [&](int64_t a, int64_t b, int64_t c) { return a * b > most ? most + 1 : a * b * c; };
  if (product(p.batch, p.height, g.width_even) + kStages * kTilePixels > most ||
      product(p.batch, g.padded_height, g.pitch) + g.pitch > most ||
      product(p.learned, p.kernel_h, p.kernel_w) > most / 2) {
    return "its pixels or weights are too many for 32-bit indices";
  }
  return "";
}

}  // namespace

const char* name_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::ffma: return "ffma";
    case Kernel::mma: return "mma";
    case Kernel::wgmma: return "wgmma";
    case Kernel::depthwise: return "depthwise";
  }
  return "?";
}

std::string obstacle(const Problem& p, const Device& device, Kernel kernel) {
  if (std::min({p.batch, p.channels, p.height, p.width, p.learned, p.out_height, p.out_width, p.kernel_h, p.kernel_w,
                p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) < 1 ||
      std::min(p.padding_h, p.padding_w) < 0) {
    return "every size must be at least 1";
  }
  if (auto reason = too_large(p); !reason.empty()) return reason;
  // Before what was built: no build has these.
  if (kernel == Kernel::wgmma && device.capability != 90) return "it needs compute capability 9.0";
  if (kernel == Kernel::mma && device.capability < 80) return "it needs compute capability 8.0 or newer";
  if ((device.kernels >> int(kernel) & 1) == 0) return "this build holds no code of it for this device";
  if (kernel == Kernel::depthwise) {
    const auto end = std::end(kDepthwiseSizes);
    if (!p.depthwise) return "it is not depthwise";
    if (p.normed) return "it does not normalise its input";
    if (p.channels != p.learned) return "it needs one input channel a learned filter";
    if (p.kernel_h != p.kernel_w || std::find(std::begin(kDepthwiseSizes), end, p.kernel_h) == end) {
      return "it needs filters of 3x3, 5x5 or 7x7";
    }
    return "";
  }
  if (p.depthwise) return "it is depthwise";
  if (kernel == Kernel::ffma) return p.normed ? "it does not normalise its input" : "";
  if (p.type == Type::float32) return "tensor cores take bfloat16 and float16";
  if (!channels_last(p) || p.channels % 8 != 0 || !strides_divide_by(p, 8) || !p.aligned) {
    return "it needs a channels_last input with a multiple of 8 channels on a 16-byte boundary";
  }
  if (kernel == Kernel::wgmma) {
    if (p.normed) return "it does not normalise its input";
    if (p.x_stride[2] != p.width * p.x_stride[3] || p.x_stride[0] != p.height * p.x_stride[2] || p.width % 2 != 0) {
      return "it needs a dense input of even width";
    }
  }
  return "";
}

Plan make_plan(const Problem& problem, const Device& device, Kernel kernel) {
  if (const auto reason = obstacle(problem, device, kernel); !reason.empty()) {
    throw std::invalid_argument(std::string(name_of(kernel)) + ": " + reason);
  }
  Plan plan{};
  plan.problem = problem, plan.device = device, plan.kernel = kernel;
  Task& task = plan.task;
  task.geometry = kernel == Kernel::depthwise ? make_depthwise_geometry(problem) : make_geometry(problem);
  task.out_type = problem.out_type;
  std::copy_n(problem.x_stride, 4, task.x_stride);
  std::copy_n(problem.gradient_stride, 4, task.gradient_stride);
  std::copy_n(problem.out_stride, 4, task.out_stride);
  if (kernel == Kernel::depthwise) {
    plan_depthwise(plan);
  } else {
    plan_gemm(plan);
  }
  return plan;
}

Plan make_plan(const Problem& problem, const Device& device) {
  Plan best{};
  best.microseconds = std::numeric_limits<double>::infinity();
  std::ostringstream obstacles;
  for (const Kernel kernel : {Kernel::wgmma, Kernel::mma, Kernel::ffma, Kernel::depthwise}) {
    try {
      const Plan plan = make_plan(problem, device, kernel);
      if (plan.microseconds < best.microseconds) best = plan;
    } catch (const std::invalid_argument& error) {
      obstacles << (obstacles.tellp() > 0 ? "; " : "") << error.what();
    }
  }
  if (std::isinf(best.microseconds)) throw std::invalid_argument(obstacles.str());
  return best;
}

}  // namespace rwn
