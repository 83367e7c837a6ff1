// y = W x, for the tests of the stand-in: one threadgroup a row, whose simdgroups share its words.
//
//   w       uint32 [N, K / 8]   eight 4-bit codes a word, the low ones first
//   scales  T      [N, K / G]
//   biases  T      [N, K / G]
//   x       T      [K]
//   y       T      [N]
threadgroup float partial[SIMDS];
const uint row = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
auto words = w + row * (K / 8);
auto scale = scales + row * (K / G);
auto bias = biases + row * (K / G);

float sum = 0;
for (uint i = simd * 32 + lane; i < K / 8; i += SIMDS * 32) {
  const uint q = words[i];
  auto xs = x + i * 8;
  float product = 0, plain = 0;
  for (uint j = 0; j < 8; j++) {
    const float value = float(xs[j]);
    product = fma(float((q >> (4 * j)) & 15), value, product);
    plain += value;
  }
  sum += float(scale[i * 8 / G]) * product + float(bias[i * 8 / G]) * plain;
}
sum = simd_sum(sum);
if (lane == 0) {
  partial[simd] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
sum = simd_sum(lane < SIMDS ? partial[lane] : 0.0f);
if (simd == 0 && lane == 0) {
  y[row] = static_cast<T>(sum);
}
