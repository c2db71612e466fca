// The index arithmetic of the weight gradient as a matrix product: which pixel, which gradient value, which tap, which
// byte of shared memory. Plain functions for host and device: checks/check_geometry.cpp runs these very functions
// against loop nests, the kernels use nothing else to find an address.
//
//   dW[k, r, s, c] = sum over pixels (n, h, w) of  X[n, h, w, c] * G[n, h + (R-1-r) dh, w + (S-1-s) dw, k]
//
// G is the gradient of the learned filters in a frame of zeros, `stride - 1` zeros between its rows and columns: the
// input stays where it is and only the few channels of G are shifted. G is never stored in global memory; each block
// keeps the "slab" of it that its pixels see in shared memory, one plane a filter.
//
//   pixel     v = (n H + h) width_even + w, rows rounded up to an even width, so that the pair (2i, 2i + 1) lies in one
//             row; a pixel with w = W is no pixel of X and counts as zero.
//   position  of a pixel in G, (n padded_height + h) pitch + w; a tap is a constant distance from it.
//   column    of the product, (k R + r) S + s.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define RWN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RWN_HOST_DEVICE inline
#endif

namespace rwn {

// Pixels of one stage of the pipelines, and the unit in which pixels are shared out to blocks.
constexpr int kTilePixels = 64;

// n / divisor for 0 <= n < 2^31 by one multiplication.
struct Divider {
  uint32_t divisor = 1, magic = 0x80000001u;
  int shift = 31;

  static Divider of(int d) {
    int log = 0;
    while ((int64_t(1) << log) < d) ++log;
    return {uint32_t(d), uint32_t((uint64_t(1) << (31 + log)) / uint32_t(d) + 1), 31 + log};
  }
  RWN_HOST_DEVICE int quotient(int n) const { return int((uint64_t(uint32_t(n)) * magic) >> shift); }
  RWN_HOST_DEVICE int remainder(int n) const { return n - quotient(n) * int(divisor); }
};

struct Pixel {
  int image, row, column;
};

// Where in grad_output a position of G comes from; not inside: a zero.
struct Source {
  int image, row, column;
  bool inside;
};

struct Geometry {
  int batch, channels, height, width;  // of the input
  int out_height, out_width;           // of grad_output
  int learned, kernel_h, kernel_w, dilation_h, dilation_w, stride_h, stride_w;
  int width_even, padded_height, pitch, origin_h, origin_w;
  int pixels, columns;  // both counts include nothing but what the product needs: N H width_even, Kt R S
  Divider by_width, by_height, by_pitch, by_padded_height, by_stride_h, by_stride_w, by_taps, by_kernel_w;

  RWN_HOST_DEVICE Pixel pixel(int v) const {
    const int row_index = by_width.quotient(v);
    const int image = by_height.quotient(row_index);
    return {image, row_index - image * height, v - row_index * width_even};
  }

  RWN_HOST_DEVICE int position(int v) const {
    const Pixel at = pixel(v);
    return (at.image * padded_height + at.row) * pitch + at.column;
  }

  // Words of one plane of the slab that serves the pixels first .. last.
  RWN_HOST_DEVICE int span(int first, int last) const {
    return position(last) - position(first) + (kernel_h - 1) * dilation_h * pitch + (kernel_w - 1) * dilation_w + 1;
  }

  RWN_HOST_DEVICE Source source(int position) const {
    const int row_index = by_pitch.quotient(position);
    const int image = by_padded_height.quotient(row_index);
    const int y = row_index - image * padded_height - origin_h;
    const int x = position - row_index * pitch - origin_w;
    if (y < 0 || x < 0 || image >= batch) return {0, 0, 0, false};
    const int row = by_stride_h.quotient(y), column = by_stride_w.quotient(x);
    const bool inside =
        row * stride_h == y && column * stride_w == x && row < out_height && column < out_width;
    return {image, row, column, inside};
  }

  RWN_HOST_DEVICE int filter_of(int column) const { return by_taps.quotient(column); }

  // Words from a pixel's position to the value that `column` multiplies it with, in a slab whose first plane is
  // `first_filter`. Columns past the last have no value: they read something and are never stored.
  RWN_HOST_DEVICE int shift(int column, int first_filter, int plane) const {
    if (column >= columns) return 0;
    const int filter = by_taps.quotient(column);
    const int tap = column - filter * int(by_taps.divisor);
    const int r = by_kernel_w.quotient(tap);
    const int s = tap - r * kernel_w;
    return (filter - first_filter) * plane + (kernel_h - 1 - r) * dilation_h * pitch +
           (kernel_w - 1 - s) * dilation_w;
  }
};

// The first tile of this split; split `splits` begins where the last one ends.
RWN_HOST_DEVICE int split_begin(int split, int splits, int tiles) {
  return int(int64_t(tiles) * split / splits);
}

// Byte of 16-byte chunk `chunk` (8 channels) of pixel `row` in a stage of X: sub-tiles of 64 channels, 128 bytes a
// pixel, chunks exchanged within each 8 pixels so that 8 pixels of one chunk lie in 8 different banks. It is TMA's and
// wgmma's 128-byte swizzle.
RWN_HOST_DEVICE int x_offset(int row, int chunk) {
  return (chunk >> 3) * (kTilePixels * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

// mma.m16n8k16: row and column of accumulator `e` of a lane; the lane's pair of k in a quarter; its B column.
RWN_HOST_DEVICE int fragment_row(int lane, int e) { return (lane >> 2) + (e >> 1) * 8; }
RWN_HOST_DEVICE int fragment_column(int lane, int e) { return (lane & 3) * 2 + (e & 1); }

// ldmatrix.x4.trans of X for mma's A (16 channels x 16 pixels): the pixel and the chunk whose row this lane names.
RWN_HOST_DEVICE int ldmatrix_pixel(int lane) { return (lane & 7) + ((lane >> 4) & 1) * 8; }
RWN_HOST_DEVICE int ldmatrix_chunk(int lane) { return (lane >> 3) & 1; }

// Byte of (column, pixel) of the unfolded gradient in a stage of B: wgmma's K-major layout without swizzle, 8 x 8
// matrices of 128 bytes; a lane's word (fragment column lane / 4, pixel pair lane % 4) is word `lane` of its matrix.
constexpr int kUnfoldedPixelStep = 128, kUnfoldedColumnStep = kTilePixels / 8 * 128;
RWN_HOST_DEVICE int unfolded_offset(int column, int pixel) {
  return (column >> 3) * kUnfoldedColumnStep + (pixel >> 3) * kUnfoldedPixelStep + (column & 7) * 16 + (pixel & 7) * 2;
}

// wgmma's description of an operand in shared memory, at `address`; steps in bytes. Swizzled (A, m across): 8 pixels of
// 64 channels are an atom of 1024 bytes, `stride` leads to the next 8 pixels. Else (B, k across): `leading` leads to the
// next 8 pixels, `stride` to the next 8 columns.
RWN_HOST_DEVICE uint64_t descriptor_of(uint32_t address, int leading, int stride, bool swizzled) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(swizzled) << 62;
}

}  // namespace rwn
