  // y[t] = residual[t] + sum over k of scores[t, k] * (down[slots[t, k]] . h[t, k])
  //        + sigmoid(gate[t]) * (shared_down . shared_h[t])
  //
  //   h           float  [R * TOP_K, IN]
  //   slots       uint32 [R, TOP_K]
  //   scores      float  [R, TOP_K]
  //   w           uint32 [S, OUT, IN * BITS / 32]
  //   s, b        W      [S, OUT, IN / GROUP]
  //   shared_h    float  [R, SHARED_IN]
  //   shared_*    as w, s, b, without the axis S
  //   gate        T      [R, GATE_STRIDE]; column GATE_AT is read
  //   residual    T      [R, OUT]
  //   y           Y      [R, OUT]
  //
  // A simdgroup takes ROWS rows (for each team of LANES lanes) of one expert; a threadgroup takes
  // the same rows of all experts of a token, and adds them up in the order of k.
  constexpr int TERMS = TOP_K + SHARED;
  constexpr int TEAMS = 32 / LANES;
  threadgroup float terms[TERMS * TEAMS * ROWS];

  const uint team = thread_index_in_simdgroup / LANES;
  const uint lane = thread_index_in_simdgroup % LANES;
  const uint token = threadgroup_position_in_grid.y;
  const uint first = (threadgroup_position_in_grid.x * TEAMS + team) * ROWS;

  for (uint term = simdgroup_index_in_threadgroup; term < TERMS; term += SIMDS) {
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = 0;
    if (term < TOP_K) {
      const size_t pair = size_t(token) * TOP_K + term;
      const size_t row = size_t(slots[pair]) * OUT;
      dot_rows<LANES, ROWS>(
          Matrix<BITS, GROUP, IN, W>{(const device uint*)w, s, b},
          row + first, row + OUT - 1, h + pair * IN, lane, sums);
    }
#if SHARED
    else {
      dot_rows<LANES, ROWS>(
          Matrix<SHARED_BITS, SHARED_GROUP, SHARED_IN, SHARED_W>{
              (const device uint*)shared_w, shared_s, shared_b},
          first, OUT - 1, shared_h + size_t(token) * SHARED_IN, lane, sums);
    }
#endif
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float sum = lanes_sum<LANES>(sums[r]);
      if (lane == 0) terms[(term * TEAMS + team) * ROWS + r] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (uint i = thread_index_in_threadgroup; i < TEAMS * ROWS; i += SIMDS * 32) {
    const uint out = threadgroup_position_in_grid.x * TEAMS * ROWS + i;
    if (out < OUT) {
      float sum = 0;
      for (uint k = 0; k < TOP_K; k++) {
        sum = fma(scores[token * TOP_K + k], terms[k * TEAMS * ROWS + i], sum);
      }
#if SHARED
      const float g = sigmoid(float(gate[token * GATE_STRIDE + GATE_AT]));
      sum = fma(g, terms[TOP_K * TEAMS * ROWS + i], sum);
#endif
#if RESIDUAL
      sum += float(residual[size_t(token) * OUT + out]);
#endif
      y[size_t(token) * OUT + out] = static_cast<Y>(sum);
    }
  }
