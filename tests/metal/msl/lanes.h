// Lanes, simdgroups and threadgroups on one CPU thread: what kernels need of lanes.cpp.
//
// Each lane is a fiber. It runs until it meets others, at a barrier or a simd_sum, and then lets
// the next one run. So a lane that does not come is noticed: nothing is left that could run.
#pragma once
#include <cstddef>
#include <cstdint>

namespace msl {

constexpr unsigned kSimd = 32;

struct triple {
  unsigned x, y, z;
};

// Where the lane is that runs now.
struct lane_place {
  triple in_grid, in_group;
  unsigned index, simd, in_simd;
};
const lane_place& lane();

// And its threadgroup. The last one of a row may be smaller than the others.
struct group_place {
  triple position, size, grid, groups;
  unsigned simds;
};
const group_place& group();

// What a lane waits at.
struct spot {
  const char* what;
  const char* file;
  int line;
};

// Return when all lanes of the threadgroup, or of the simdgroup, have come to the same spot.
void meet_group(spot);
void meet_simd(spot);

// The same, and what each lane of the simdgroup brought.
struct gathered {
  const uint64_t* of;
  unsigned count, lane;
};
gathered gather(uint64_t mine, spot);

// The threadgroup's memory for declaration number id, full of 0xff at its start.
void* threadgroup_memory(int id, size_t bytes);

// Run body(argument) once for each lane. sizes: of the grid, then of a threadgroup, in threads.
// seed: of the order in which lanes and threadgroups run; 0: one after another. Returns what went
// wrong, else "".
const char* launch(
    void (*body)(void*), void* argument, const unsigned* sizes, unsigned seed);

} // namespace msl
