// Many tokens of GatedDeltaNet's recurrence, one after the other.
//
//   q, k        T [L, HK, DK]       normed queries and keys
//   v           T [L, HV, DV]
//   decay, beta float [L, HV]       what is left of the state, and the share of what is new
//   state       float [HV, DV, DK]
//   y           T [L, HV, DV];  new_state: as before
//   length      L, the tokens
//
// A threadgroup of four simdgroups takes 16 rows of the state of a value head, eight lanes a row.
// A lane holds its columns in registers from the first token to the last, and loads those of the
// next token while it computes one.
constexpr int CHUNKS = (DK + 31) / 32;
constexpr int TILES = (DV + 15) / 16;
const int head = threadgroup_position_in_grid.x / TILES;
const int key_head = head / (HV / HK);
const int lane = thread_index_in_simdgroup;
const int row = threadgroup_position_in_grid.x % TILES * 16 + simdgroup_index_in_threadgroup * 4 + lane / 8;
const bool mine = row < DV;
const int first_column = lane % 8 * 4;
const int tokens = length[0];

float s[CHUNKS * 4];
float key[CHUNKS * 4];
float query[CHUNKS * 4];
float next_key[CHUNKS * 4];
float next_query[CHUNKS * 4];
#pragma unroll
for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = first_column + c * 32 + j;
    const bool there = column < DK;
    const int at = key_head * DK + column;
    s[c * 4 + j] = mine && there ? state[(head * DV + row) * DK + column] : 0.0f;
    next_key[c * 4 + j] = there ? float(k[at]) : 0.0f;
    next_query[c * 4 + j] = there ? float(q[at]) : 0.0f;
  }
}
float next_value = mine ? float(v[head * DV + row]) : 0.0f;
float next_decay = decay[head];
float next_beta = beta[head];

for (int t = 0; t < tokens; ++t) {
  const float value = next_value;
  const float kept = next_decay;
  const float share = next_beta;
#pragma unroll
  for (int i = 0; i < CHUNKS * 4; ++i) {
    key[i] = next_key[i];
    query[i] = next_query[i];
  }
  if (t + 1 < tokens) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first_column + c * 32 + j;
        const bool there = column < DK;
        const int at = ((t + 1) * HK + key_head) * DK + column;
        next_key[c * 4 + j] = there ? float(k[at]) : 0.0f;
        next_query[c * 4 + j] = there ? float(q[at]) : 0.0f;
      }
    }
    next_value = mine ? float(v[((t + 1) * HV + head) * DV + row]) : 0.0f;
    next_decay = decay[(t + 1) * HV + head];
    next_beta = beta[(t + 1) * HV + head];
  }

  float memory = 0;
#pragma unroll
  for (int i = 0; i < CHUNKS * 4; ++i) {
    s[i] *= kept;
    memory += s[i] * key[i];
  }
#pragma unroll
  for (int m = 1; m < 8; m *= 2) {
    memory += simd_shuffle_xor(memory, m);
  }
  const float delta = (value - memory) * share;
  float total = 0;
#pragma unroll
  for (int i = 0; i < CHUNKS * 4; ++i) {
    s[i] += key[i] * delta;
    total += s[i] * query[i];
  }
#pragma unroll
  for (int m = 1; m < 8; m *= 2) {
    total += simd_shuffle_xor(total, m);
  }
  if (mine && lane % 8 == 0) {
    y[(t * HV + head) * DV + row] = static_cast<T>(total);
  }
}
#pragma unroll
for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = first_column + c * 32 + j;
    if (mine && column < DK) {
      new_state[(head * DV + row) * DK + column] = s[c * 4 + j];
    }
  }
}
