  // y[t, n] = w[n] . x[t]
  //
  //   x     T      [R, IN]
  //   w     uint32 [outs, IN * BITS / 32]
  //   s, b  W      [outs, IN / GROUP]
  //   y     T      [R, outs]
  //
  // LANES lanes share ROWS rows; a simdgroup has 32 / LANES such teams. A model has matrices of
  // many heights, so the height is read at run time: one compiled kernel serves all of them.
  const uint outs = w_shape[0];
  const uint team = thread_index_in_simdgroup / LANES;
  const uint lane = thread_index_in_simdgroup % LANES;
  const uint simd = threadgroup_position_in_grid.x * SIMDS + simdgroup_index_in_threadgroup;
  const uint first = (simd * (32 / LANES) + team) * ROWS;
  const uint token = threadgroup_position_in_grid.y;
  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) sums[r] = 0;
  dot_rows<LANES, ROWS>(
      Matrix<BITS, GROUP, IN, W>{(const device uint*)w, s, b},
      first, outs - 1, x + token * IN, lane, sums);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = lanes_sum<LANES>(sums[r]);
    if (lane == 0 && first + r < outs) y[size_t(token) * outs + first + r] = static_cast<T>(sum);
  }
