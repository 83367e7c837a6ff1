// Vectors of Metal, of the sizes and alignments that they have there: float3 is as large as float4.
#pragma once
#include "scalars.h"

#ifdef MSL_SPACES

// Clang's own vectors: unlike a struct they can be read from and written to any address space.
#define MSL_NAMES(T)                                        \
  using T##2 = T __attribute__((ext_vector_type(2)));       \
  using T##3 = T __attribute__((ext_vector_type(3)));       \
  using T##4 = T __attribute__((ext_vector_type(4)));

namespace msl {

template <class V>
using element = std::remove_reference_t<decltype(V()[0])>;
template <class A>
constexpr bool is_scalar =
    std::is_arithmetic_v<A> || std::is_same_v<A, half> || std::is_same_v<A, bfloat>;

// What float4(...) is there: Clang's vectors have no constructors.
template <class V, class A>
V make(A a) {
  if constexpr (is_scalar<A>) {
    return V(static_cast<element<V>>(a));
  } else {
    return __builtin_convertvector(a, V);
  }
}
template <class V, class A, class... B>
V make(A a, B... b) {
  if constexpr (is_scalar<A>) {
    return V{static_cast<element<V>>(a), static_cast<element<V>>(b)...};
  } else {
    return V{a.x, a.y, b.x..., b.y...};
  }
}

} // namespace msl

#else

namespace msl {

template <class T, int N>
struct vec;

template <class T>
struct same {
  using type = T;
};

// What .xy and .zw are: a vec2 in the place of its values.
template <class T>
struct pair {
  T x, y;
  operator vec<T, 2>() const {
    return vec<T, 2>(x, y);
  }
  pair& operator=(vec<T, 2> o) {
    x = o.x;
    y = o.y;
    return *this;
  }
};

#define MSL_MEMBERS(N)                                                          \
  vec() = default;                                                              \
  template <class A, std::enable_if_t<std::is_convertible_v<A, T>, int> = 0>    \
  vec(A a) {                                                                    \
    for (int i = 0; i < N; i++) v[i] = T(a);                                    \
  }                                                                             \
  template <class U>                                                            \
  explicit vec(vec<U, N> o) {                                                   \
    for (int i = 0; i < N; i++) v[i] = T(o[i]);                                 \
  }                                                                             \
  T& operator[](int i) {                                                        \
    return v[i];                                                                \
  }                                                                             \
  T operator[](int i) const {                                                   \
    return v[i];                                                                \
  }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T v[2];
    struct {
      T x, y;
    };
  };
  MSL_MEMBERS(2)
  vec(T a, T b) : v{a, b} {}
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T v[3];
    struct {
      T x, y, z;
    };
    pair<T> xy;
  };
  MSL_MEMBERS(3)
  vec(T a, T b, T c) : v{a, b, c} {}
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T v[4];
    struct {
      T x, y, z, w;
    };
    struct {
      pair<T> xy, zw;
    };
  };
  MSL_MEMBERS(4)
  vec(T a, T b, T c, T d) : v{a, b, c, d} {}
  vec(vec<T, 2> a, vec<T, 2> b) : v{a.x, a.y, b.x, b.y} {}
};
#undef MSL_MEMBERS

#define MSL_OPERATOR(op)                                                        \
  template <class T, int N>                                                     \
  vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                             \
    vec<T, N> c;                                                                \
    for (int i = 0; i < N; i++) c[i] = T(a[i] op b[i]);                         \
    return c;                                                                   \
  }                                                                             \
  template <class T, int N>                                                     \
  vec<T, N> operator op(vec<T, N> a, typename same<T>::type b) {                \
    return a op vec<T, N>(b);                                                   \
  }                                                                             \
  template <class T, int N>                                                     \
  vec<T, N> operator op(typename same<T>::type a, vec<T, N> b) {                \
    return vec<T, N>(a) op b;                                                   \
  }                                                                             \
  template <class T, int N, class B>                                            \
  vec<T, N>& operator op##=(vec<T, N>& a, B b) {                                \
    return a = a op vec<T, N>(b);                                               \
  }
MSL_OPERATOR(+)
MSL_OPERATOR(-)
MSL_OPERATOR(*)
MSL_OPERATOR(/)
MSL_OPERATOR(%)
MSL_OPERATOR(&)
MSL_OPERATOR(|)
MSL_OPERATOR(^)
MSL_OPERATOR(>>)
MSL_OPERATOR(<<)
#undef MSL_OPERATOR

} // namespace msl

#define MSL_NAMES(T)            \
  using T##2 = msl::vec<T, 2>;  \
  using T##3 = msl::vec<T, 3>;  \
  using T##4 = msl::vec<T, 4>;

#endif

MSL_NAMES(float)
MSL_NAMES(half)
MSL_NAMES(bfloat)
MSL_NAMES(int)
MSL_NAMES(uint)
MSL_NAMES(short)
MSL_NAMES(ushort)
MSL_NAMES(char)
MSL_NAMES(uchar)
#undef MSL_NAMES

#ifdef MSL_SPACES
// Only where arguments follow, so that types stay what they are.
#define float2(...) msl::make<float2>(__VA_ARGS__)
#define float3(...) msl::make<float3>(__VA_ARGS__)
#define float4(...) msl::make<float4>(__VA_ARGS__)
#define uint2(...) msl::make<uint2>(__VA_ARGS__)
#define uint3(...) msl::make<uint3>(__VA_ARGS__)
#define uint4(...) msl::make<uint4>(__VA_ARGS__)
#define half2(...) msl::make<half2>(__VA_ARGS__)
#define half4(...) msl::make<half4>(__VA_ARGS__)
#endif
