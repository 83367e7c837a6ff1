// h = x + r and the RMS norm of h, in the middle of a decoder layer, for a few rows.
//
//   x, r       T [rows, D]
//   weight     T [D]
//   eps        [1]
//   h, normed  T [rows, D]
//
// A threadgroup takes one row. Values are rounded where MLX's own addition and norm round.
constexpr int THREADS = SIMDS * 32;
constexpr int EACH = (D + THREADS - 1) / THREADS;

threadgroup float partial[SIMDS];

const int index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int row = threadgroup_position_in_grid.x * D;

float v[EACH];
float total = 0;
#pragma unroll
for (int j = 0; j < EACH; ++j) {
  const int i = index + j * THREADS;
  if (i < D) {
    const T sum = static_cast<T>(float(x[row + i]) + float(r[row + i]));
    h[row + i] = sum;
    v[j] = float(sum);
    total += v[j] * v[j];
  }
}
total = simd_sum(total);
if (lane == 0) {
  partial[simdgroup_index_in_threadgroup] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
total = simd_sum(lane < SIMDS ? partial[lane] : 0.0f);

const float scale = rsqrt(total / D + eps[0]);
#pragma unroll
for (int j = 0; j < EACH; ++j) {
  const int i = index + j * THREADS;
  if (i < D) {
    const T unit = static_cast<T>(v[j] * scale);
    normed[row + i] = static_cast<T>(float(unit) * float(weight[i]));
  }
}
