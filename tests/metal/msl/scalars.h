// Scalar types of Metal: half and bfloat round after every operation, as the GPU's do.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;
using ulong = unsigned long;

namespace msl {

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// To nearest, ties to even.
inline uint16_t half_from_float(float f) {
  uint32_t x = bits<uint32_t>(f), sign = (x >> 16) & 0x8000, size = x & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00;
  if (size >= 0x477ff000) return sign | 0x7c00;
  if (size < 0x38800000) { // subnormal: the sum rounds at half's last bit
    return sign | (bits<uint32_t>(bits<float>(size) + 0.5f) - 0x3f000000);
  }
  return sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13);
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, m = h & 0x3ff;
  if (exponent == 31) return bits<float>(sign | 0x7f800000 | (m << 13));
  if (exponent) return bits<float>(sign | ((exponent + 112) << 23) | (m << 13));
  float f = m * 5.9604644775390625e-8f; // 2 ** -24
  return sign ? -f : f;
}

inline uint16_t bfloat_from_float(float f) {
  uint32_t x = bits<uint32_t>(f);
  if ((x & 0x7fffffff) > 0x7f800000) return (x >> 16) | 0x40;
  return (x + 0x7fff + ((x >> 16) & 1)) >> 16;
}

inline float bfloat_to_float(uint16_t b) {
  return bits<float>(uint32_t(b) << 16);
}

template <uint16_t (*From)(float), float (*To)(uint16_t)>
struct small_float {
  uint16_t raw;

  small_float() = default;
  template <class A, std::enable_if_t<std::is_arithmetic_v<A>, int> = 0>
  small_float(A a) : raw(From(float(a))) {}
  template <uint16_t (*F)(float), float (*T)(uint16_t)>
  explicit small_float(small_float<F, T> other) : raw(From(float(other))) {}
  operator float() const {
    return To(raw);
  }

  small_float operator-() const {
    return small_float(-float(*this));
  }
// With a float it is a float, with an integer it stays what it is.
#define MSL_OPERATOR(op)                                                  \
  friend small_float operator op(small_float a, small_float b) {          \
    return small_float(float(a) op float(b));                             \
  }                                                                       \
  friend float operator op(small_float a, float b) {                      \
    return float(a) op b;                                                 \
  }                                                                       \
  friend float operator op(float a, small_float b) {                      \
    return a op float(b);                                                 \
  }                                                                       \
  template <class I, std::enable_if_t<std::is_integral_v<I>, int> = 0>    \
  friend small_float operator op(small_float a, I b) {                    \
    return a op small_float(b);                                           \
  }                                                                       \
  template <class I, std::enable_if_t<std::is_integral_v<I>, int> = 0>    \
  friend small_float operator op(I a, small_float b) {                    \
    return small_float(a) op b;                                           \
  }                                                                       \
  small_float& operator op##=(float other) {                              \
    return *this = small_float(float(*this) op other);                    \
  }
  MSL_OPERATOR(+)
  MSL_OPERATOR(-)
  MSL_OPERATOR(*)
  MSL_OPERATOR(/)
#undef MSL_OPERATOR
};

} // namespace msl

#ifdef MSL_SPACES // only checked, and not run: built-in types keep address spaces in sight
using half = _Float16;
using bfloat = __bf16;
#else
using half = msl::small_float<msl::half_from_float, msl::half_to_float>;
using bfloat = msl::small_float<msl::bfloat_from_float, msl::bfloat_to_float>;
#endif
using float16_t = half;
using bfloat16_t = bfloat;
