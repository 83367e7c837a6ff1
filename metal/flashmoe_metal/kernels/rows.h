// Products of rows of a matrix with a vector, 32 columns at a time: a chunk.
//
// A weight takes BITS bits. Below 16, a row is a little-endian stream of codes q, and the weight is
// scale * q + bias of its group of GROUP columns; 32 codes are BITS words of 32 bits. With 16 and
// 32, weights are plain floats of type W. No chunk is in two groups: GROUP is 32, 64 or 128.

/// Loads N words of 32 bits in the widest loads: `from` is aligned to the largest of 4, 2, 1 words
/// that divides N.
template <int N>
METAL_FUNC void load_words(const device uint* from, thread uint* to) {
  if (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      const uint4 v = ((const device uint4*)from)[i];
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  } else if (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const uint2 v = ((const device uint2*)from)[i];
      to[2 * i] = v.x, to[2 * i + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = from[i];
  }
}

/// Value i of floats of type T that are stored in words.
template <typename T>
struct Floats;
template <>
struct Floats<float> {
  static METAL_FUNC float at(thread const uint* words, int i) {
    return as_type<float>(words[i]);
  }
};
template <>
struct Floats<bfloat16_t> {
  static METAL_FUNC float at(thread const uint* words, int i) {
    return as_type<float>(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
};
template <>
struct Floats<half> {
  static METAL_FUNC float at(thread const uint* words, int i) {
    return float(as_type<half>(ushort(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu)));
  }
};

/// Weight i of a chunk: 2^BITS + q where it is packed. The code is put into the mantissa of 2^BITS,
/// which takes no conversion; `Chunk.add` subtracts the 2^BITS again.
template <int BITS, typename W>
struct Weights {
  static METAL_FUNC float at(thread const uint* words, int i) {
    const int word = i * BITS / 32, shift = i * BITS % 32;
    const int up = 23 - BITS;
    uint bits;
    if (shift + BITS > 32) {
      bits = (words[word] >> shift | words[word + (shift + BITS > 32)] << (32 - shift)) << up;
    } else if (shift > up) {
      bits = words[word] >> (shift > up ? shift - up : 0);
    } else {
      bits = words[word] << (shift > up ? 0 : up - shift);
    }
    return as_type<float>((bits & (((1u << BITS) - 1) << up)) | uint(127 + BITS) << 23);
  }
};
template <typename W>
struct Weights<16, W> {
  static METAL_FUNC float at(thread const uint* words, int i) {
    return Floats<W>::at(words, i);
  }
};
template <typename W>
struct Weights<32, W> {
  static METAL_FUNC float at(thread const uint* words, int i) {
    return Floats<W>::at(words, i);
  }
};

/// A matrix [.., IN] as stored in memory. scales and biases: [.., IN / GROUP] where BITS < 16.
template <int BITS_, int GROUP_, int IN_, typename W_>
struct Matrix {
  static constant constexpr const int BITS = BITS_;
  static constant constexpr const int GROUP = GROUP_;
  static constant constexpr const int IN = IN_;
  typedef W_ W;
  const device uint* words;
  const device W* scales;
  const device W* biases;
};

/// A chunk of the vector.
struct Values {
  float x[32];
  float sum;
};

template <typename T>
METAL_FUNC void load_values(const device T* from, thread Values& to) {
  uint words[8 * sizeof(T)];
  load_words<8 * sizeof(T)>((const device uint*)from, words);
  to.sum = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    to.x[i] = Floats<T>::at(words, i);
    to.sum += to.x[i];
  }
}

/// A chunk of ROWS rows of a matrix, as it is stored.
template <int ROWS, class M>
struct Chunk {
  uint words[ROWS][M::BITS];
  float scales[ROWS];
  float biases[ROWS];

  /// Loads rows first + r. Rows past `last` are read as row `last`, so that every lane has work.
  METAL_FUNC void load(M m, size_t first, size_t last, uint chunk) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const size_t row = first + r < last ? first + r : last;
      load_words<M::BITS>(m.words + row * (M::IN * M::BITS / 32) + chunk * M::BITS, words[r]);
      if (M::BITS < 16) {
        const size_t group = row * (M::IN / M::GROUP) + chunk * 32 / M::GROUP;
        scales[r] = float(m.scales[group]);
        biases[r] = float(m.biases[group]);
      }
    }
  }

  /// sums[r] += row r . v
  METAL_FUNC void add(thread const Values& v, thread float* sums) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 32; i++) {
        sum = fma(Weights<M::BITS, typename M::W>::at(words[r], i), v.x[i], sum);
      }
      if (M::BITS < 16) {
        const float q = fma(-float(1 << M::BITS % 16), v.sum, sum);
        sums[r] = fma(scales[r], q, fma(biases[r], v.sum, sums[r]));
      } else {
        sums[r] += sum;
      }
    }
  }
};

/// The sum of v over LANES neighbouring lanes, in each of them.
template <int LANES>
METAL_FUNC float lanes_sum(float v) {
#pragma unroll
  for (int k = LANES / 2; k; k /= 2) v += simd_shuffle_xor(v, k);
  return v;
}

METAL_FUNC float sigmoid(float x) {
  return 1 / (1 + exp(-x));
}

/// Adds to a[r] and b[r] this lane's part of the products of row first + r of two matrices with x.
template <int LANES, int ROWS, class M, typename T>
METAL_FUNC void dot_rows(
    M ma, M mb, size_t first, size_t last, const device T* x, uint lane, thread float* a,
    thread float* b) {
  constexpr int chunks = M::IN / 32;
#pragma unroll 2
  for (int i = 0; i < (chunks + LANES - 1) / LANES; i++) {
    const uint chunk = i * LANES + lane;
    if (chunks % LANES == 0 || chunk < chunks) {
      Chunk<ROWS, M> ca, cb;
      ca.load(ma, first, last, chunk);
      cb.load(mb, first, last, chunk);
      Values v;
      load_values(x + chunk * 32, v);
      ca.add(v, a);
      cb.add(v, b);
    }
  }
}

/// Does the same with one matrix.
template <int LANES, int ROWS, class M, typename T>
METAL_FUNC void dot_rows(
    M m, size_t first, size_t last, const device T* x, uint lane, thread float* sums) {
  constexpr int chunks = M::IN / 32;
#pragma unroll 2
  for (int i = 0; i < (chunks + LANES - 1) / LANES; i++) {
    const uint chunk = i * LANES + lane;
    if (chunks % LANES == 0 || chunk < chunks) {
      Chunk<ROWS, M> c;
      c.load(m, first, last, chunk);
      Values v;
      load_values(x + chunk * 32, v);
      c.add(v, sums);
    }
  }
}
