// The element types as bits, and their conversions: nothing of CUDA's own headers, which are slow to compile.
#pragma once
#include <cstdint>
#include <cstring>

#include "geometry.h"

namespace rwn {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

RWN_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
RWN_HOST_DEVICE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

RWN_HOST_DEVICE float to_float(float value) { return value; }
RWN_HOST_DEVICE float to_float(bf16 value) { return float_of_bits(uint32_t(value.bits) << 16); }
RWN_HOST_DEVICE float to_float(f16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Shifted into place the exponent is 112 too small: a product by 2^112 sets it right, for subnormal numbers too.
  return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * float_of_bits(0x77800000u)));
#endif
}

template <class T>
struct Rounded;
template <>
struct Rounded<float> {
  RWN_HOST_DEVICE static float of(float value) { return value; }
};
template <>
struct Rounded<bf16> {
  RWN_HOST_DEVICE static bf16 of(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};
    return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Rounded<f16> {
  RWN_HOST_DEVICE static f16 of(float value) {
#ifdef __CUDA_ARCH__
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (rest >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more
    if (rest < 0x38800000u) {                                    // subnormal: the adder rounds at 2^-24
      const float shifted = float_of_bits(rest) + 0.5f;
      return {uint16_t(sign | (bits_of_float(shifted) - 0x3f000000u))};
    }
    return {uint16_t(sign | ((rest + 0xfffu + ((rest >> 13) & 1u)) - 0x38000000u) >> 13)};
#endif
  }
};

}  // namespace rwn
