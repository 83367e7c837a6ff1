// Sorts the pairs of tokens by their experts, in one block of 1024 threads: for CUDA only.
//
//   chosen  uint32 [P]        the expert of each pair, which is its slot, below EXPERTS;
//                             P = tokens * TOP_K
//   sizes   int32 [4]         P, TILES
//   rows    uint32 [P]        the token of each pair, in the order of the experts
//   tiles   int32 [TILES, 3]  slot, first pair and end of up to 128 pairs; the rest is zeros
//   places  uint32 [P]        where each pair is in that order
//
// The pairs of one expert come in any order: no bit of what is computed depends on it.
__shared__ int counts[EXPERTS];
__shared__ int firsts[EXPERTS];
__shared__ int sums[2][1024];
const int index = threadIdx.x;
const int pairs = sizes[0];
const int all_tiles = sizes[1];
for (int e = index; e < EXPERTS; e += 1024) counts[e] = 0;
__syncthreads();
for (int i = index; i < pairs; i += 1024) atomicAdd(&counts[chosen[i]], 1);
__syncthreads();

// Each thread has EACH experts. How many pairs and tiles are before them?
constexpr int EACH = (EXPERTS + 1023) / 1024;
int my_pairs = 0;
int my_tiles = 0;
for (int i = 0; i < EACH; ++i) {
  const int e = index * EACH + i;
  if (e < EXPERTS) {
    my_pairs += counts[e];
    my_tiles += (counts[e] + 127) / 128;
  }
}
sums[0][index] = my_pairs;
sums[1][index] = my_tiles;
for (int step = 1; step < 1024; step *= 2) {
  __syncthreads();
  const int p = index >= step ? sums[0][index - step] : 0;
  const int t = index >= step ? sums[1][index - step] : 0;
  __syncthreads();
  sums[0][index] += p;
  sums[1][index] += t;
}
__syncthreads();
int pair = sums[0][index] - my_pairs;
int tile = sums[1][index] - my_tiles;
for (int i = 0; i < EACH; ++i) {
  const int e = index * EACH + i;
  if (e < EXPERTS) {
    const int end = pair + counts[e];
    firsts[e] = pair;
    for (; pair < end; pair += 128, ++tile) {
      tiles[3 * tile] = e;
      tiles[3 * tile + 1] = pair;
      tiles[3 * tile + 2] = min(pair + 128, end);
    }
    pair = end;
  }
}
for (int t = sums[1][1023] + index; t < all_tiles; t += 1024) {
  tiles[3 * t] = tiles[3 * t + 1] = tiles[3 * t + 2] = 0;
}
__syncthreads();
for (int i = index; i < pairs; i += 1024) {
  const int at = atomicAdd(&firsts[chosen[i]], 1);
  rows[at] = i / TOP_K;
  places[i] = at;
}
