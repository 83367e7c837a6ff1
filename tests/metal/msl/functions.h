// What kernels call: barriers, collectives of a simdgroup, and mathematics.
#pragma once
#include <cmath>
#include <limits>

#include "lanes.h"
#include "vectors.h"

// Where a call stands, as arguments by default.
#define MSL_SPOT const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags, MSL_SPOT) {
  msl::meet_group({"threadgroup_barrier", file, line});
}
inline void simdgroup_barrier(mem_flags, MSL_SPOT) {
  msl::meet_simd({"simdgroup_barrier", file, line});
}

} // namespace metal

namespace msl {

// Other lanes' values of v.
template <class T>
struct values {
  gathered all;
  T operator()(unsigned i) const {
    T v;
    std::memcpy(&v, &all.of[i], sizeof v);
    return v;
  }
};
template <class T>
values<T> exchange(T v, spot s) {
  static_assert(sizeof(T) <= 8);
  uint64_t mine = 0;
  std::memcpy(&mine, &v, sizeof v);
  return {gather(mine, s)};
}

} // namespace msl

namespace metal {

#define MSL_REDUCTION(name, sum_of_a_and_b)                             \
  template <class T>                                                    \
  T name(T v, MSL_SPOT) {                                               \
    auto of = msl::exchange(v, {#name, file, line});                    \
    T a = of(0);                                                        \
    for (unsigned i = 1; i < of.all.count; i++) {                       \
      T b = of(i);                                                      \
      a = sum_of_a_and_b;                                               \
    }                                                                   \
    return a;                                                           \
  }
MSL_REDUCTION(simd_sum, T(a + b))
MSL_REDUCTION(simd_product, T(a * b))
MSL_REDUCTION(simd_max, (b > a ? b : a))
MSL_REDUCTION(simd_min, (b < a ? b : a))
#undef MSL_REDUCTION

// A value from a lane that is not there is the lane's own.
#define MSL_SHUFFLE(name, from)                                         \
  template <class T>                                                    \
  T name(T v, ushort k, MSL_SPOT) {                                     \
    auto of = msl::exchange(v, {#name, file, line});                    \
    const unsigned lane = of.all.lane, source = from;                   \
    return source < of.all.count ? of(source) : v;                      \
  }
MSL_SHUFFLE(simd_shuffle, (void(lane), k))
MSL_SHUFFLE(simd_broadcast, (void(lane), k))
MSL_SHUFFLE(simd_shuffle_xor, lane ^ k)
MSL_SHUFFLE(simd_shuffle_down, lane + k)
MSL_SHUFFLE(simd_shuffle_up, lane - k)
#undef MSL_SHUFFLE

template <class T>
T quad_sum(T v, MSL_SPOT) {
  auto of = msl::exchange(v, {"quad_sum", file, line});
  unsigned first = of.all.lane & ~3u;
  return T(T(of(first) + of(first + 1)) + T(of(first + 2) + of(first + 3)));
}
template <class T>
T simd_broadcast_first(T v, MSL_SPOT) {
  return msl::exchange(v, {"simd_broadcast_first", file, line})(0);
}
inline bool simd_all(bool v, MSL_SPOT) {
  auto of = msl::exchange(v, {"simd_all", file, line});
  bool all = true;
  for (unsigned i = 0; i < of.all.count; i++) all &= of(i);
  return all;
}
inline bool simd_any(bool v, MSL_SPOT) {
  auto of = msl::exchange(v, {"simd_any", file, line});
  bool any = false;
  for (unsigned i = 0; i < of.all.count; i++) any |= of(i);
  return any;
}

#define MSL_FUNCTION(name)       \
  inline float name(float x) {   \
    return std::name(x);         \
  }
MSL_FUNCTION(exp)
MSL_FUNCTION(exp2)
MSL_FUNCTION(log)
MSL_FUNCTION(log2)
MSL_FUNCTION(sqrt)
MSL_FUNCTION(tanh)
MSL_FUNCTION(floor)
MSL_FUNCTION(ceil)
MSL_FUNCTION(trunc)
MSL_FUNCTION(rint)
MSL_FUNCTION(fabs)
#undef MSL_FUNCTION
using std::abs;
using std::isinf;
using std::isnan;
using std::numeric_limits;
inline float rsqrt(float x) {
  return 1 / std::sqrt(x);
}
inline float fma(float a, float b, float c) {
  return std::fma(a, b, c);
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <class T>
T select(T if_false, T if_true, bool c) {
  return c ? if_true : if_false;
}
inline uint popcount(uint x) {
  return __builtin_popcount(x);
}
inline uint clz(uint x) {
  return x ? __builtin_clz(x) : 32;
}
inline uint ctz(uint x) {
  return x ? __builtin_ctz(x) : 32;
}

#define MSL_DOT(V, ...)              \
  inline float dot(V a, V b) {       \
    return __VA_ARGS__;              \
  }
MSL_DOT(float2, a.x * b.x + a.y * b.y)
MSL_DOT(float3, a.x * b.x + a.y * b.y + a.z * b.z)
MSL_DOT(float4, a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w)
#undef MSL_DOT

#define MSL_PRECISIONS(space) \
  namespace space {           \
  using metal::exp;           \
  using metal::exp2;          \
  using metal::log;           \
  using metal::log2;          \
  using metal::rsqrt;         \
  using metal::sqrt;          \
  using metal::tanh;          \
  }
MSL_PRECISIONS(fast)
MSL_PRECISIONS(precise)
#undef MSL_PRECISIONS

} // namespace metal

template <class To, class From>
To as_type(From from) {
  return msl::bits<To>(from);
}
