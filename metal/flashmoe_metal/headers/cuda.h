// Defines for CUDA the words of Metal in which the bodies are written, as far as they use them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mlx::core::cu {

using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;
using half = __half;
using bfloat16_t = __nv_bfloat16;

template <class To, class From>
__device__ inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From));
  union {
    From from;
    To to;
  } bits = {from};
  return bits.to;
}

__device__ inline float rsqrt(float x) {
  return ::rsqrtf(x);
}

namespace fast {
__device__ inline float exp(float x) {
  return __expf(x);
}
} // namespace fast

// All 32 lanes call each of these together: CUDA demands it and Metal allows it.
template <class T>
__device__ inline T simd_shuffle_xor(T v, ushort mask) {
  return __shfl_xor_sync(0xffffffff, v, mask);
}
template <class T>
__device__ inline T simd_shuffle_down(T v, ushort delta) {
  return __shfl_down_sync(0xffffffff, v, delta);
}
template <class T>
__device__ inline T simd_sum(T v) {
  for (int k = 16; k; k >>= 1) v += __shfl_xor_sync(0xffffffff, v, k);
  return v;
}
__device__ inline uint simd_max(uint v) {
  return __reduce_max_sync(0xffffffff, v);
}
__device__ inline int simd_max(int v) {
  return __reduce_max_sync(0xffffffff, v);
}
__device__ inline float simd_max(float v) {
  for (int k = 16; k; k >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, k));
  return v;
}

// Writes word i at an address of page-locked memory of the host, unless the address is 0. The host
// sees the word when it has waited for the kernel.
__device__ inline void post(unsigned long long address, uint i, uint word) {
  if (address) reinterpret_cast<volatile uint*>(address)[i] = word;
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
__device__ inline void threadgroup_barrier(mem_flags) {
  __syncthreads();
}

__device__ inline uint linear_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

} // namespace mlx::core::cu

#define METAL_FUNC __device__ inline
#define device
#define constant
#define thread
#define threadgroup __shared__
#define threadgroup_position_in_grid blockIdx
#define thread_position_in_threadgroup threadIdx
#define threads_per_threadgroup blockDim
#define thread_index_in_threadgroup linear_thread()
#define simdgroup_index_in_threadgroup (linear_thread() / 32)
#define thread_index_in_simdgroup (linear_thread() % 32)
