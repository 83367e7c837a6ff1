// Tensor-core helpers for CUDA: pieces of 16 bytes in shared memory, and products of 16 x 8 x 16.
// T is __nv_bfloat16 or __half.

template <class T>
struct Pair {
  using Type = __nv_bfloat162;
  // Twice 2^MANTISSA. A smaller code, or-ed into its bits, gives the sum of both.
  static constexpr uint OFFSET = 0x43004300;
  static constexpr int MANTISSA = 7; // bits
  static __device__ inline Type of(float v) { return __float2bfloat162_rn(v); }
  static __device__ inline Type of(float x, float y) { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Pair<__half> {
  using Type = __half2;
  static constexpr uint OFFSET = 0x64006400;
  static constexpr int MANTISSA = 10;
  static __device__ inline Type of(float v) { return __float2half2_rn(v); }
  static __device__ inline Type of(float x, float y) { return __floats2half2_rn(x, y); }
};

// Two codes, which lie in the low bits of the halves of `codes`, times scale plus bias, rounded
// once.
template <class T, int BITS>
__device__ inline uint unpack_pair(uint codes, typename Pair<T>::Type scale, typename Pair<T>::Type bias) {
  using P = Pair<T>;
  typename P::Type q;
  if constexpr (BITS <= P::MANTISSA) {
    q = __hsub2(as_type<typename P::Type>(codes | P::OFFSET), P::of(float(1 << P::MANTISSA)));
  } else {
    q = P::of(float(codes & 0xffff), float(codes >> 16));
  }
  return as_type<uint>(__hfma2(q, scale, bias));
}

// The code of weight i among packed words.
template <int BITS>
__device__ inline uint code_at(const uint* words, int i) {
  const int at = i * BITS;
  uint v = words[at / 32] >> (at % 32);
  if (at % 32 + BITS > 32) v |= words[at / 32 + 1] << (32 - at % 32);
  return v & ((1u << BITS) - 1);
}

// The eight weights of a word of 4 bits each: four words of two.
template <class T>
__device__ inline void unpack_word(
    uint word, typename Pair<T>::Type scale, typename Pair<T>::Type bias, uint* out) {
  uint pair[4]; // codes j and j + 4
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    pair[j] = unpack_pair<T, 4>((word >> (4 * j)) & 0x000f000f, scale, bias);
  }
  out[0] = __byte_perm(pair[0], pair[1], 0x5410);
  out[1] = __byte_perm(pair[2], pair[3], 0x5410);
  out[2] = __byte_perm(pair[0], pair[1], 0x7632);
  out[3] = __byte_perm(pair[2], pair[3], 0x7632);
}

// 32 weights of a row, unpacked: 16 words of two each.
template <class T, int BITS>
__device__ inline void unpack(
    const uint* words, typename Pair<T>::Type scale, typename Pair<T>::Type bias, uint* out) {
  if constexpr (BITS == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack_word<T>(words[i], scale, bias, out + 4 * i);
  } else {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint codes = code_at<BITS>(words, 2 * i) | code_at<BITS>(words, 2 * i + 1) << 16;
      out[i] = unpack_pair<T, BITS>(codes, scale, bias);
    }
  }
}

// Starts to copy 32 packed weights, BITS words, to shared memory by the widest copies that their
// alignment allows.
template <int BITS>
__device__ inline void copy_own(uint to, const uint* from) {
  if constexpr (BITS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < BITS; i += 4) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to + 4 * i), "l"(from + i));
    }
  } else if constexpr (BITS % 2 == 0) {
#pragma unroll
    for (int i = 0; i < BITS; i += 2) {
      asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8;" ::"r"(to + 4 * i), "l"(from + i));
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
      asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 4;" ::"r"(to + 4 * i), "l"(from + i));
    }
  }
}

// Reads the words that this thread has copied; only after `wait_for_copies`.
template <int BITS>
__device__ inline void read_own(uint from, uint* words) {
  if constexpr (BITS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < BITS; i += 4) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                   : "r"(from + 4 * i)
                   : "memory");
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS; ++i) {
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[i]) : "r"(from + 4 * i) : "memory");
    }
  }
}

// The byte in a stage where piece `i` of a row of 64 values begins. Rows are 128 bytes, and their
// pieces are shuffled so that the pieces `i` of eight rows are in different banks.
__device__ inline uint piece(int row, int i) {
  return (row * 8 + (i ^ (row & 7))) * 16;
}

// Starts to copy 16 bytes to shared memory, or zeros.
__device__ inline void copy_piece(uint to, const void* from, bool zero) {
  const int nbytes = zero ? 0 : 16;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(nbytes));
}
__device__ inline void end_copies() {
  asm volatile("cp.async.commit_group;");
}
// Waits until all but the last LEFT groups of this thread's copies have arrived; `end_copies` ends
// a group.
template <int LEFT>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ inline void store_piece(uint to, const uint* v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]),
               "r"(v[3])
               : "memory");
}

// Loads four matrices of 8 x 8 values; each lane gives the address of one of their 32 rows.
__device__ inline void load_matrices(uint* v, uint from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}

// c += a b, for 16 x 16 values of a and 16 x 8 of b.
template <class T>
__device__ inline void multiply_add(float* c, const uint* a, uint b0, uint b1) {
  if constexpr (Pair<T>::MANTISSA == 7) { // bfloat16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#if TWO_BLOCKS
// MLX writes the first line of a kernel, so its launch bounds come in here. They keep the registers
// of a thread few enough for two blocks of 256 threads on a multiprocessor.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 2)
#endif
