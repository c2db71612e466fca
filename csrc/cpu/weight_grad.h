// The weight gradient of few filters on a CPU, in float32: what is asked for, and the parts it is made of.
#pragma once
#include <cstdint>

namespace rwn::cpu {

// Sizes, and strides in elements. Of the result (Kt, C, R, S), `learned` is Kt. `depthwise`: each learned filter sees
// one channel, and the input holds these alone, Kt; the result is (Kt, 1, R, S).
struct Problem {
  bool depthwise;
  int batch, channels, height, width;
  int learned, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t input_stride[4], gradient_stride[4], result_stride[4];
  int block_floats;  // of the input and the gradient, that are worked on at a time

  int taps() const { return kernel_h * kernel_w; }
};

// One step of the work: some images' share of the gradient, for one tile of channels or several. The last of several
// ends where the channels do, so that it is whole: it may share channels with the one before.
struct Item {
  int first_image, images;
  int first_channel, channels;
};

// Where pixels lie, of the input or of the gradient; their channels lie side by side.
struct Steps {
  int64_t image, row, column;
};

// The code of one instruction set. `gradient`, of the item's images, is (N, P, Q, Kt) with `gradient_halo` columns of
// zeros before and after Q, `sums` (tiles, taps, Kt, tile) and all zero before; `scratch` holds `scratch_floats`. Of
// depthwise filters, a tile of channels is one of filters, `sums` (tiles, taps, tile).
struct Code {
  const char* name;
  int tile, depthwise_tile;  // channels that are worked on at once
  void (*correlate)(const Problem&, const Item&, const float* input, const float* gradient, float* scratch,
                    float* sums);
  int64_t (*scratch_floats)(const Problem&);
  int (*gradient_halo)(const Problem&);
  void (*correlate_depthwise)(const Problem&, const Item&, const float* input, const Steps&, const float* gradient,
                              const Steps&, float* sums);
};

// Those that this machine can run, the best first; then nullptr.
const Code* const* codes();

// As many as the first level cache has room for beside the sums.
int block_floats();

// The best for so many channels: wide registers that they do not fill are slower than narrow ones. The last resort is
// none for that.
const Code& code_for(int channels, bool depthwise);

// result[k, c, r, s] = sum over n, p, q of grad_output[n, filters[k], p, q] * input[n, c, p', q'], where
// p' = p * stride_h + r * dilation_h - padding_h, q' likewise; of depthwise filters result[k, 0, r, s], c being k. The
// order of the sums depends on the sizes and the machine, not on `threads`. Unless it is null or the filters are
// depthwise, `bias` (Kt) becomes the sums of grad_output[:, filters].
void weight_grad(const Code& code, const Problem& p, const float* input, const float* grad_output,
                 const int64_t* filters, float* result, float* bias, int threads);

}  // namespace rwn::cpu
