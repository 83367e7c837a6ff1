  // y[t] as `down` computes it, with the same bits, from products that were computed apart.
  //
  //   terms     float  [P, OUT]       down . h of each pair, in any order
  //   places    uint32 [R, TOP_K]     the row of terms that holds pair t * TOP_K + k
  //   scores    float  [R, TOP_K]
  //   shared    float  [R, OUT]       shared_down . shared_h
  //   gate      T      [R, GATE_STRIDE]; column GATE_AT is read
  //   residual  T      [R, OUT]
  //   y         T      [R, OUT]
  const uint out = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
  const uint token = threadgroup_position_in_grid.y;
  if (out < OUT) {
    float sum = 0;
    for (uint k = 0; k < TOP_K; k++) {
      const uint pair = token * TOP_K + k;
      sum = fma(scores[pair], terms[size_t(places[pair]) * OUT + out], sum);
    }
#if SHARED
    const float g = sigmoid(float(gate[token * GATE_STRIDE + GATE_AT]));
    sum = fma(g, shared[size_t(token) * OUT + out], sum);
#endif
#if RESIDUAL
    sum += float(residual[size_t(token) * OUT + out]);
#endif
    y[size_t(token) * OUT + out] = static_cast<Y>(sum);
  }
