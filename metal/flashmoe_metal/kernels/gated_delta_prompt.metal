// Many tokens of GatedDeltaNet's recurrence, one after the other.
//
//   q, k        float [L, HK, DK]   normed queries and keys; DK is a multiple of 4
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
const int row = threadgroup_position_in_grid.x % TILES * 16
    + simdgroup_index_in_threadgroup * 4 + lane / 8;
const bool mine = row < DV;
const int first_column = lane % 8 * 4;
const int tokens = length[0];

float s[CHUNKS * 4];
float key[CHUNKS * 4];
float query[CHUNKS * 4];
float4 next_key[CHUNKS];
float4 next_query[CHUNKS];
auto keys = reinterpret_cast<const device float4*>(k);
auto queries = reinterpret_cast<const device float4*>(q);
const float4 zero = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
for (int c = 0; c < CHUNKS; ++c) {
  const int column = first_column + c * 32;
  const bool there = column < DK;
  next_key[c] = there ? keys[(key_head * DK + column) / 4] : zero;
  next_query[c] = there ? queries[(key_head * DK + column) / 4] : zero;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    s[c * 4 + j] = mine && there ? state[(head * DV + row) * DK + column + j] : 0.0f;
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
  for (int c = 0; c < CHUNKS; ++c) {
    key[c * 4] = next_key[c].x;
    key[c * 4 + 1] = next_key[c].y;
    key[c * 4 + 2] = next_key[c].z;
    key[c * 4 + 3] = next_key[c].w;
    query[c * 4] = next_query[c].x;
    query[c * 4 + 1] = next_query[c].y;
    query[c * 4 + 2] = next_query[c].z;
    query[c * 4 + 3] = next_query[c].w;
  }
  if (t + 1 < tokens) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = first_column + c * 32;
      const int at = (((t + 1) * HK + key_head) * DK + column) / 4;
      next_key[c] = column < DK ? keys[at] : zero;
      next_query[c] = column < DK ? queries[at] : zero;
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
