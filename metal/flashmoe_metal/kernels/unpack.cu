// A packed matrix as plain numbers: for CUDA only. At 4 bits a thread takes a word of 8 codes, else
// 32 codes, which are whole words.
//
//   w, s, b     the matrix [N, K]
//   y      T    [N, K]
constexpr int CODES = BITS == 4 ? 8 : 32;
const size_t at = (size_t(blockIdx.x) * 256 + threadIdx.x) * CODES;
if (at < size_t(N) * K) {
  const auto scale = Pair<T>::of(float(s[at / GROUP]));
  const auto bias = Pair<T>::of(float(b[at / GROUP]));
  uint out[CODES / 2];
  const uint* from = w + at / 32 * BITS;
  if constexpr (BITS == 4) {
    unpack_word<T>(from[at % 32 / 8], scale, bias, out);
  } else {
    uint words[BITS];
#pragma unroll
    for (int i = 0; i < BITS; ++i) words[i] = from[i];
    unpack<T, BITS>(words, scale, bias, out);
  }
#pragma unroll
  for (int i = 0; i < CODES / 8; ++i) {
    reinterpret_cast<uint4*>(y + at)[i] =
        make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
  }
}
