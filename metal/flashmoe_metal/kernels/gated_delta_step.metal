// One token of GatedDeltaNet, from its projections to the input of its output projection.
//
//   qkv          [.. QKV_AT + C], C = 2 * HK * DK + HV * DV: queries, keys, values of all heads
//   z            [.. Z_AT + HV * DV]       the gate of the output
//   b, a         [.. B_AT + HV], [.. A_AT + HV]
//   conv_state   [TAPS - 1, C]             what the convolution saw last, oldest first
//   conv_weight  [C, TAPS]
//   a_log, dt_bias [HV]; norm_weight [DV]
//   eps          [2]                       added to the norm's mean of squares; to a squared length
//   state        float [HV, DV, DK]
//   out          [HV * DV];  new_conv, new_state: as before
//
// A threadgroup takes one value head, so that the norm over its DV rows needs no other launch.
// Eight lanes share a row of the state; each loads four columns at a time: 16 bytes a lane, 128 of
// the row.
constexpr int THREADS = SIMDS * 32;
constexpr int C = 2 * HK * DK + HV * DV;
constexpr int CHUNKS = (DK + 31) / 32;
constexpr int ROWS = SIMDS * 4;
constexpr int PASSES = (DV + ROWS - 1) / ROWS;

threadgroup float query[DK];
threadgroup float key[DK];
threadgroup float value[DV];
threadgroup float y[DV];

const int head = threadgroup_position_in_grid.x;
const int key_head = head / (HV / HK);
const int index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int first_row = simdgroup_index_in_threadgroup * 4 + lane / 8;
const int first_column = lane % 8 * 4;

// The loads of the state are in flight while the convolution is computed.
auto before = reinterpret_cast<const device float4*>(state + head * DV * DK);
auto after = reinterpret_cast<device float4*>(new_state + head * DV * DK);
float4 s[PASSES][CHUNKS];
#pragma unroll
for (int p = 0; p < PASSES; ++p) {
  const int row = first_row + p * ROWS;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = first_column + c * 32;
    if (row < DV && column < DK) {
      s[p][c] = before[(row * DK + column) / 4];
    }
  }
}

for (int i = index; i < 2 * DK + DV; i += THREADS) {
  // i counts the channels of this head: its query's, its key's and its value's.
  const int channel = i < DK ? key_head * DK + i
      : i < 2 * DK           ? (HK + key_head - 1) * DK + i
                             : 2 * (HK - 1) * DK + head * DV + i;
  const float newest = float(qkv[QKV_AT + channel]);
  float taps[TAPS];
  float total = 0;
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
    taps[t] = t < TAPS - 1 ? float(conv_state[t * C + channel]) : newest;
    total += taps[t] * float(conv_weight[channel * TAPS + t]);
  }
  total = total / (1.0f + exp(-total));
  if (i < DK) {
    query[i] = total;
  } else if (i < 2 * DK) {
    key[i - DK] = total;
  } else {
    value[i - 2 * DK] = total;
  }
  // Heads that share a key head have its channels in common: the first of them stores those.
  if (i >= 2 * DK || head % (HV / HK) == 0) {
#pragma unroll
    for (int t = 0; t < TAPS - 1; ++t) {
      new_conv[t * C + channel] = static_cast<T>(taps[t + 1]);
    }
  }
}

// Each thread computes the decay of the state and the share of what is new: a barrier costs more.
const float step = float(a[A_AT + head]) + float(dt_bias[head]);
const float softplus = max(step, 0.0f) + log1p(exp(-abs(step)));
const float decay = exp(-exp(float(a_log[head])) * softplus);
const float beta = 1.0f / (1.0f + exp(-float(b[B_AT + head])));
threadgroup_barrier(mem_flags::mem_threadgroup);

// Eight lanes see all columns, so each simdgroup computes the lengths of query and key itself.
float query_scale = 0;
float key_scale = 0;
#pragma unroll
for (int c = 0; c < CHUNKS; ++c) {
  const int column = first_column + c * 32;
  if (column < DK) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      query_scale += query[column + j] * query[column + j];
      key_scale += key[column + j] * key[column + j];
    }
  }
}
#pragma unroll
for (int m = 1; m < 8; m *= 2) {
  query_scale += simd_shuffle_xor(query_scale, m);
  key_scale += simd_shuffle_xor(key_scale, m);
}
query_scale = rsqrt(query_scale + eps[1]) * rsqrt(float(DK));
key_scale = rsqrt(key_scale + eps[1]);

#pragma unroll
for (int p = 0; p < PASSES; ++p) {
  const int row = first_row + p * ROWS;
  const bool mine = row < DV;
  float memory = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = first_column + c * 32;
    if (mine && column < DK) {
      s[p][c].x *= decay;
      s[p][c].y *= decay;
      s[p][c].z *= decay;
      s[p][c].w *= decay;
      memory += s[p][c].x * key[column] + s[p][c].y * key[column + 1];
      memory += s[p][c].z * key[column + 2] + s[p][c].w * key[column + 3];
    }
  }
#pragma unroll
  for (int m = 1; m < 8; m *= 2) {
    memory += simd_shuffle_xor(memory, m);
  }
  const float delta = mine ? (value[row] - memory * key_scale) * beta * key_scale : 0.0f;
  float total = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = first_column + c * 32;
    if (mine && column < DK) {
      s[p][c].x += key[column] * delta;
      s[p][c].y += key[column + 1] * delta;
      s[p][c].z += key[column + 2] * delta;
      s[p][c].w += key[column + 3] * delta;
      total += s[p][c].x * query[column] + s[p][c].y * query[column + 1];
      total += s[p][c].z * query[column + 2] + s[p][c].w * query[column + 3];
      after[(row * DK + column) / 4] = s[p][c];
    }
  }
#pragma unroll
  for (int m = 1; m < 8; m *= 2) {
    total += simd_shuffle_xor(total, m);
  }
  if (mine && lane % 8 == 0) {
    y[row] = total * query_scale;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float squares = 0;
for (int i = lane; i < DV; i += 32) {
  squares += y[i] * y[i];
}
const float scale = rsqrt(simd_sum(squares) / DV + eps[0]);
for (int i = index; i < DV; i += THREADS) {
  const float gate = float(z[Z_AT + head * DV + i]);
  const float normed = y[i] * scale * float(norm_weight[i]);
  out[head * DV + i] = static_cast<T>(normed * (gate / (1.0f + exp(-gate))));
}
