  // The TOP_K largest of softmax(logits[t]) and their indices, ascending; of equal ones, the lower
  // index comes first: the end of a stable sort, which is what mlx-lm takes on a GPU. As in MLX,
  // the probabilities come from the fast exponential and are rounded to T.
  //
  //   logits   T      [R, STRIDE]; the first E columns are read
  //   indices  uint32 [R, TOP_K]
  //   scores   float  [R, TOP_K]    divided by their sum when NORMALISE
  //   mailbox  uint64 [1]           the address where the indices are written too: see `post`
  //
  // A simdgroup takes one token; lane l has experts l, l + 32, ...
  constexpr int MINE = (E + 31) / 32;
  const uint lane = thread_index_in_simdgroup;
  const uint token = threadgroup_position_in_grid.x;

  float values[MINE];
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const uint e = i * 32 + lane;
    values[i] = e < E ? float(logits[token * STRIDE + e]) : -INFINITY;
    most = values[i] > most ? values[i] : most;
  }
  most = simd_max(most);
  float total = 0;
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    values[i] = i * 32 + lane < E ? fast::exp(values[i] - most) : 0;
    total += values[i];
  }
  total = simd_sum(total);

  // Each probability as an integer that orders as it does, and 0 where there is no expert. NaN
  // (0x7fc00000) becomes the largest.
  uint keys[MINE];
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const float p = float(static_cast<T>(values[i] * (1 / total)));
    keys[i] = i * 32 + lane < E ? (as_type<uint>(p) & 0x7fffffffu) + 1 : 0;
  }

  float sum = 0;
  for (int k = TOP_K - 1; k >= 0; k--) {
    uint best = 0;
    uint at = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      if (keys[i] >= best) best = keys[i], at = i;
    }
    const uint key = simd_max(best);
    const uint index = simd_max(best == key ? at * 32 + lane : 0u);
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      if (i * 32 + lane == index) keys[i] = 0;
    }
    const float score = as_type<float>(key - 1);
    sum += score;
    if (k % 32 == int(lane)) {
      indices[token * TOP_K + k] = index;
      post(mailbox[0], token * TOP_K + k, index);
      scores[token * TOP_K + k] = score;
    }
  }
  if (NORMALISE) {
    for (uint k = lane; k < TOP_K; k += 32) {
      scores[token * TOP_K + k] = scores[token * TOP_K + k] / sum;
    }
  }
