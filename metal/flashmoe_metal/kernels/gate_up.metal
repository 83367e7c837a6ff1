  // h[p, i] = silu(gate[s, i] . x[t]) * (up[s, i] . x[t]), for pair p = t * TOP_K + k in slot s.
  //
  //   x        T      [R, IN]
  //   slots    uint32 [R, TOP_K]
  //   *_w      uint32 [S, OUT, IN * BITS / 32]
  //   *_s, *_b W      [S, OUT, IN / GROUP]
  //   h        float  [R * TOP_K, OUT]
  //   shared_h float  [R, SHARED_OUT]; shared_*: as those above, without the axis S
  //
  // LANES lanes share ROWS rows of both matrices; a simdgroup has 32 / LANES such teams. The grid
  // has a row for each expert of a token, and one for the shared expert when SHARED.
  const uint team = thread_index_in_simdgroup / LANES;
  const uint lane = thread_index_in_simdgroup % LANES;
  const uint simd = threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup;
  const uint first = (simd * (32 / LANES) + team) * ROWS;
  const uint token = threadgroup_position_in_grid.y / (TOP_K + SHARED);
  const uint term = threadgroup_position_in_grid.y % (TOP_K + SHARED);
  const uint pair = token * TOP_K + term;
#if SHARED
  const bool routed = term < TOP_K;
  const uint outs = routed ? OUT : SHARED_OUT;
#else
  const bool routed = true;
  const uint outs = OUT;
#endif

  float gate[ROWS], up[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) gate[r] = up[r] = 0;
  if (routed) {
    typedef Matrix<BITS, GROUP, IN, W> M;
    const size_t row = size_t(slots[pair]) * OUT;
    dot_rows<LANES, ROWS>(
        M{(const device uint*)gate_w, gate_s, gate_b}, M{(const device uint*)up_w, up_s, up_b},
        row + first, row + OUT - 1, x + token * IN, lane, gate, up);
  }
#if SHARED
  else {
    typedef Matrix<SHARED_BITS, SHARED_GROUP, IN, SHARED_W> M;
    dot_rows<LANES, ROWS>(
        M{(const device uint*)shared_gate_w, shared_gate_s, shared_gate_b},
        M{(const device uint*)shared_up_w, shared_up_s, shared_up_b},
        first, SHARED_OUT - 1, x + token * IN, lane, gate, up);
  }
#endif
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float g = lanes_sum<LANES>(gate[r]), u = lanes_sum<LANES>(up[r]);
    if (lane == 0 && first + r < outs) {
      const float y = g * sigmoid(g) * u;
      if (routed) h[size_t(pair) * OUT + first + r] = y;
#if SHARED
      else shared_h[token * SHARED_OUT + first + r] = y;
#endif
    }
  }
