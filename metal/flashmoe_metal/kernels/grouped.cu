// The rows of each expert times its packed matrix, on tensor cores: for CUDA only.
//
//   x       T      [.., K]
//   rows    uint32 [R]            the row of x of each pair (GATE_UP); else pair i has row i
//   tiles   int32  [.., 3]        slot, first pair and end of up to 128 pairs of one expert
//   w, s, b                       packed matrices [slots, N, K], a second one (up) with GATE_UP
//   y       [R, N]                with GATE_UP silu(gate x) * up x of type T, else float
//
// A block of 256 threads computes 128 pairs times 128 matrix rows (with GATE_UP 64 of each matrix),
// 64 columns at a time. x and packed weights are copied to shared memory two steps before they are
// needed. Each thread unpacks 32 weights for the next step while the tensor cores are busy with this
// one. Every sum is taken in the order of the columns, whatever other pairs a tile has.
constexpr int STAGE = 128 * 64 * 2; // bytes of 128 rows, 64 values each
constexpr int STEPS = K / 64;
extern __shared__ __align__(128) unsigned char stages[];
const uint a_stages = uint(__cvta_generic_to_shared(stages));
const uint b_stages = a_stages + 3 * STAGE;
const uint w_stages = b_stages + 2 * STAGE;

const int index = threadIdx.x;
const int lane = index % 32;
const int warp_row = index / 128;
const int warp_column = index / 32 % 4;
const int slot = tiles[3 * blockIdx.y];
const int first = tiles[3 * blockIdx.y + 1];
const int end = tiles[3 * blockIdx.y + 2];
if (first == end) return; // a table that was made on the GPU has more tiles than it needs

// This thread copies one piece of 16 bytes of each of four rows of x.
uint a_from[4];
#pragma unroll
for (int i = 0; i < 4; ++i) {
  const int row = first + index / 8 + 32 * i;
  const int at = row < end ? row : first;
#if GATE_UP
  a_from[i] = rows[at] * K + index % 8 * 8;
#else
  a_from[i] = uint(at) * K + index % 8 * 8;
#endif
}
auto copy_a = [&](int step) {
  if (step < STEPS) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint to = a_stages + step % 3 * STAGE + piece(index / 8 + 32 * i, index % 8);
      copy_piece(to, x + a_from[i] + step * 64, first + index / 8 + 32 * i >= end);
    }
  }
  end_copies();
};

// And it unpacks half a matrix row of a step.
const int b_row = index / 2;
const int half_at = index % 2;
#if GATE_UP
// Of the 32 matrix rows of a warp, 16 are of gate and 16 of up, for the same columns of y.
const bool of_up = b_row % 32 >= 16;
const int n = min(int(blockIdx.x) * 64 + b_row / 32 * 16 + b_row % 16, N - 1);
const uint* b_words = of_up ? w2 : w;
const T* b_scales = of_up ? s2 : s;
const T* b_biases = of_up ? b2 : b;
#else
const int n = min(int(blockIdx.x) * 128 + b_row, N - 1);
const uint* b_words = w;
const T* b_scales = s;
const T* b_biases = b;
#endif
const size_t matrix_row = size_t(slot) * N + n;
b_words += matrix_row * (K / 32 * BITS) + half_at * BITS;
b_scales += matrix_row * (K / GROUP);
b_biases += matrix_row * (K / GROUP);
// Packed words wait in shared memory, where this thread alone reads them; scales in registers.
auto copy_words = [&](int step) {
  if (step < STEPS) {
    copy_own<BITS>(w_stages + (step % 3 * 256 + index) * (BITS * 4), b_words + step * 2 * BITS);
  }
};
T scales[3], biases[3];
auto load_scales = [&](int step, int at) {
  if (step < STEPS) {
    const int group = (step * 64 + half_at * 32) / GROUP;
    scales[at] = b_scales[group];
    biases[at] = b_biases[group];
  }
};
auto store_b = [&](int step, T scale, T bias) {
  uint words[BITS], out[16];
  read_own<BITS>(w_stages + (step % 3 * 256 + index) * (BITS * 4), words);
  unpack<T, BITS>(words, Pair<T>::of(float(scale)), Pair<T>::of(float(bias)), out);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    store_piece(b_stages + step % 2 * STAGE + piece(b_row, half_at * 4 + i), out + 4 * i);
  }
};

float sums[4][4][4] = {};
// Whether this warp has pairs at all; rows that are not there are zeros.
const bool there = first + warp_row * 64 < end;

// The copies of a step are its x and the words of the step after it.
load_scales(0, 0);
load_scales(1, 1);
load_scales(2, 2);
copy_words(0);
copy_words(1);
copy_a(0);
copy_words(2);
copy_a(1);
wait_for_copies<1>();
store_b(0, scales[0], biases[0]);
for (int step = 0; step < STEPS; ++step) {
  wait_for_copies<1>();
  __syncthreads();
  copy_words(step + 3);
  copy_a(step + 2);
  if (step + 1 < STEPS) {
    const T scale = scales[1];
    const T bias = biases[1];
    scales[1] = scales[2];
    biases[1] = biases[2];
    load_scales(step + 3, 2);
    store_b(step + 1, scale, bias);
  }
  const uint a_at = a_stages + step % 3 * STAGE;
  const uint b_at = b_stages + step % 2 * STAGE;
  if (!there) continue;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    // All loads first, so that they are in flight together.
    uint a[4][4], bs[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = warp_column * 32 + j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(bs[j], b_at + piece(row, 2 * k + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_matrices(a[i], a_at + piece(warp_row * 64 + i * 16 + lane % 16, 2 * k + lane / 16));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply_add<T>(sums[i][j], a[i], bs[j / 2][j % 2 * 2], bs[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

#pragma unroll
for (int i = 0; i < 4; ++i) {
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    const int pair = first + warp_row * 64 + i * 16 + lane / 4 + below * 8;
    if (pair < end) {
#if GATE_UP
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = blockIdx.x * 64 + warp_column * 16 + j * 8 + lane % 4 * 2;
        const float* gate = sums[i][j] + 2 * below;
        const float* up = sums[i][j + 2] + 2 * below;
        if (column < N) {
          const float h0 = gate[0] / (1.0f + __expf(-gate[0])) * up[0];
          const float h1 = gate[1] / (1.0f + __expf(-gate[1])) * up[1];
          *reinterpret_cast<uint*>(y + size_t(pair) * N + column) =
              as_type<uint>(Pair<T>::of(h0, h1));
        }
      }
#else
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = blockIdx.x * 128 + warp_column * 32 + j * 8 + lane % 4 * 2;
        if (column < N) {
          *reinterpret_cast<float2*>(y + size_t(pair) * N + column) =
              make_float2(sums[i][j][2 * below], sums[i][j][2 * below + 1]);
        }
      }
#endif
    }
  }
}
