// The norms and rotation of one token's queries and keys, and the sigmoid of its gates.
//
//   queries    [.. Q_AT + H * D]; gated [.. Q_AT + H * 2 * D], each head's query, then its gate
//   keys       [.. K_AT + HK * D]
//   q_weight, k_weight [D]
//   eps        [2]       of the norms of queries and keys
//   rope       [2]       log2 of the base, and the scale of positions
//   offset     int [1]   the token's position
//   q [H, D], k [HK, D], gate [H * D]; gate is [1] and not written when there is none
//
// A simdgroup takes one head. Values are rounded where MLX's own norm, rope and sigmoid round.
constexpr int HALF = ROPE / 2;

threadgroup float unit[D];

const int lane = thread_index_in_simdgroup;
const int group = threadgroup_position_in_grid.x;
const bool is_query = group < H;
const int head = is_query ? group : group - H;
const int from = is_query ? Q_AT + head * (GATED ? 2 * D : D) : K_AT + head * D;

float squares = 0;
for (int i = lane; i < D; i += 32) {
  const float v = is_query ? float(queries[from + i]) : float(keys[from + i]);
  unit[i] = v;
  squares += v * v;
}
const float scale = rsqrt(simd_sum(squares) / D + (is_query ? eps[0] : eps[1]));
for (int i = lane; i < D; i += 32) {
  const float w = is_query ? float(q_weight[i]) : float(k_weight[i]);
  const T v = static_cast<T>(unit[i] * scale);
  unit[i] = float(static_cast<T>(float(v) * w));
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const float position = rope[1] * float(offset[0]);
for (int i = lane; i < D; i += 32) {
  float y = unit[i];
  if (i < ROPE) {
    // The two values of a pair are half of the rotated width apart.
    const int pair = i % HALF;
    const float theta = position * float(exp2(-(float(pair) / HALF) * rope[0]));
    const float other = i < HALF ? -unit[i + HALF] : unit[i - HALF];
    y = y * float(cos(theta)) + other * float(sin(theta));
  }
  if (is_query) {
    q[head * D + i] = static_cast<T>(y);
  } else {
    k[head * D + i] = static_cast<T>(y);
  }
  if (GATED && is_query) {
    gate[head * D + i] = static_cast<T>(1.0f / (1.0f + exp(-float(queries[from + D + i]))));
  }
}
