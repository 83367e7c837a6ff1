// See lanes.h. Compiled once, and linked to each kernel.
#include "lanes.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

namespace msl {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kGuard = 64;
// What Apple's GPUs have.
constexpr size_t kMostMemory = 32 << 10;
constexpr unsigned kMostLanes = 1024;

struct fiber {
  lane_place place;
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  spot waits;
};

// Where lanes meet. turn: counts the meetings.
struct gate {
  unsigned size = 0, arrived = 0, turn = 0;
  spot first;
};

struct simdgroup {
  gate meets;
  // Of this meeting and of the next: a fast lane comes to the next before a slow one has read.
  uint64_t slots[2][kSimd];
};

struct memory {
  size_t bytes;
  std::unique_ptr<unsigned char[]> all;

  explicit memory(size_t n) : bytes(n), all(new unsigned char[n + 3 * kGuard]) {}
  unsigned char* data() {
    auto first = reinterpret_cast<uintptr_t>(all.get()) + 2 * kGuard - 1;
    return reinterpret_cast<unsigned char*>(first / kGuard * kGuard);
  }
  void poison() {
    std::memset(all.get(), 0xff, bytes + 3 * kGuard);
  }
  bool written_outside() {
    unsigned char *begin = all.get(), *end = begin + bytes + 3 * kGuard;
    for (auto p = begin; p < end; p++) {
      if (*p != 0xff && (p < data() || p >= data() + bytes)) return true;
    }
    return false;
  }
};

struct launching {
  void (*body)(void*);
  void* argument;
  group_place place;
  std::vector<fiber> fibers;
  std::vector<simdgroup> simds;
  gate all;
  std::map<int, memory> memories;
  size_t current = 0;
  bool moved = false; // a lane ended, or a meeting was complete, in this round
  jmp_buf scheduler;
  std::string error;
};

thread_local launching* now = nullptr;

fiber& self() {
  return now->fibers[now->current];
}

std::string text(spot s) {
  return std::string(s.what) + " (" + s.file + ":" + std::to_string(s.line) + ")";
}

// Ends the launch, from within a lane. The stacks of all lanes are dropped as they are.
[[noreturn]] void fail(std::string why) {
  const triple &g = now->place.position, &t = self().place.in_group;
  char where[120];
  std::snprintf(
      where, sizeof where, "; lane (%u, %u, %u) of threadgroup (%u, %u, %u)",
      t.x, t.y, t.z, g.x, g.y, g.z);
  now->error = why + where;
  _longjmp(now->scheduler, 1);
}

// A lane that is done stays on its stack, and runs the next threadgroup's body there.
void life() {
  for (;;) {
    now->body(now->argument);
    self().done = now->moved = true;
    if (!_setjmp(self().at)) _longjmp(now->scheduler, 1);
  }
}

void resume(size_t i) {
  now->current = i;
  if (_setjmp(now->scheduler)) return;
  fiber& f = self();
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.start);
}

bool same(spot a, spot b) {
  return a.line == b.line && !std::strcmp(a.what, b.what) && !std::strcmp(a.file, b.file);
}

void meet(gate& g, spot s) {
  if (g.arrived == 0) g.first = s;
  if (!same(g.first, s)) {
    fail("lanes of one group meet at " + text(g.first) + " and at " + text(s));
  }
  unsigned turn = g.turn;
  if (++g.arrived == g.size) {
    g.arrived = 0;
    g.turn++;
    now->moved = true;
    return;
  }
  self().waits = s;
  while (g.turn == turn) {
    if (!_setjmp(self().at)) _longjmp(now->scheduler, 1);
  }
}

std::string deadlock() {
  std::map<std::string, int> counts;
  for (auto& f : now->fibers) counts[f.done ? "that returned" : "at " + text(f.waits)]++;
  std::string why = "lanes wait for lanes that never come:";
  for (auto& [where, count] : counts) {
    why += (why.back() == ':' ? " " : ", ") + std::to_string(count) + " " + where;
  }
  return why;
}

void run_rounds(std::mt19937& random, bool shuffled) {
  std::vector<size_t> order(now->fibers.size());
  std::iota(order.begin(), order.end(), 0);
  for (size_t left = order.size(); left;) {
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    now->moved = false;
    left = 0;
    for (size_t i : order) {
      if (now->fibers[i].done) continue;
      resume(i);
      if (!now->error.empty()) return;
      left += !now->fibers[i].done;
    }
    if (left && !now->moved) now->error = deadlock();
    if (!now->error.empty()) return;
  }
}

void check_memories() {
  size_t sum = 0;
  for (auto& [id, m] : now->memories) {
    sum += m.bytes;
    if (m.written_outside()) now->error = "a write outside a threadgroup array";
  }
  if (sum > kMostMemory) {
    now->error = std::to_string(sum) + " bytes of threadgroup memory, of at most " +
        std::to_string(kMostMemory);
  }
}

// Lanes of one threadgroup, where they are.
void settle(triple position, triple full, char* stacks) {
  auto& p = now->place;
  auto rest = [](unsigned all, unsigned begin, unsigned n) { return std::min(all - begin, n); };
  triple begin = {position.x * full.x, position.y * full.y, position.z * full.z};
  p.position = position;
  p.size = {
      rest(p.grid.x, begin.x, full.x),
      rest(p.grid.y, begin.y, full.y),
      rest(p.grid.z, begin.z, full.z)};
  unsigned n = p.size.x * p.size.y * p.size.z;
  p.simds = (n + kSimd - 1) / kSimd;
  now->fibers.resize(n);
  now->simds.assign(p.simds, {});
  now->all = {};
  now->all.size = n;
  for (unsigned i = 0; i < n; i++) {
    fiber& f = now->fibers[i];
    triple in = {i % p.size.x, i / p.size.x % p.size.y, i / (p.size.x * p.size.y)};
    triple at = {begin.x + in.x, begin.y + in.y, begin.z + in.z};
    f.place = {at, in, i, i / kSimd, i % kSimd};
    f.done = false;
    now->simds[i / kSimd].meets.size++;
    if (f.started) continue;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = stacks + i * kStack;
    f.start.uc_stack.ss_size = kStack;
    f.start.uc_link = nullptr;
    makecontext(&f.start, life, 0);
  }
  for (auto& [id, m] : now->memories) m.poison();
}

void run_all(triple full, char* stacks, unsigned seed) {
  std::mt19937 random(seed);
  const triple& n = now->place.groups;
  std::vector<triple> order;
  for (unsigned z = 0; z < n.z; z++)
    for (unsigned y = 0; y < n.y; y++)
      for (unsigned x = 0; x < n.x; x++) order.push_back({x, y, z});
  if (seed) std::shuffle(order.begin(), order.end(), random);
  for (triple position : order) {
    settle(position, full, stacks);
    run_rounds(random, seed != 0);
    if (now->error.empty()) check_memories();
    if (!now->error.empty()) return;
  }
}

// An access far outside ends the launch and not the process. ASan says more about it.
#ifndef MSL_SANITIZED
void on_signal(int number, siginfo_t* info, void*) {
  char why[100] = "a division of integers by zero";
  if (number != SIGFPE) {
    std::snprintf(why, sizeof why, "an access outside all memory, at %p", info->si_addr);
  }
  fail(why);
}

class signals {
  static constexpr int kNumbers[] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction before_[3];
  stack_t stack_before_;
  // Lanes that overflow their stack have none left for the handler.
  std::vector<char> stack_ = std::vector<char>(64 << 10);

 public:
  signals() {
    stack_t own = {};
    own.ss_sp = stack_.data();
    own.ss_size = stack_.size();
    sigaltstack(&own, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; i++) sigaction(kNumbers[i], &action, &before_[i]);
  }
  ~signals() {
    for (int i = 0; i < 3; i++) sigaction(kNumbers[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
};
#else
struct signals {
  ~signals() {}
};
#endif

} // namespace

const lane_place& lane() {
  return self().place;
}
const group_place& group() {
  return now->place;
}

void meet_group(spot s) {
  meet(now->all, s);
}
void meet_simd(spot s) {
  meet(now->simds[self().place.simd].meets, s);
}

gathered gather(uint64_t mine, spot s) {
  unsigned i = self().place.in_simd;
  simdgroup& simd = now->simds[self().place.simd];
  uint64_t* slots = simd.slots[simd.meets.turn & 1];
  slots[i] = mine;
  meet(simd.meets, s);
  return {slots, simd.meets.size, i};
}

void* threadgroup_memory(int id, size_t bytes) {
  auto [found, made] = now->memories.try_emplace(id, bytes);
  if (made) found->second.poison();
  return found->second.data();
}

const char* launch(
    void (*body)(void*), void* argument, const unsigned* sizes, unsigned seed) {
  static thread_local std::string error;
  triple grid = {sizes[0], sizes[1], sizes[2]}, full = {sizes[3], sizes[4], sizes[5]};
  auto up = [](unsigned a, unsigned b) { return (a + b - 1) / b; };
  launching l;
  l.body = body;
  l.argument = argument;
  l.place.grid = grid;
  l.place.groups = {up(grid.x, full.x), up(grid.y, full.y), up(grid.z, full.z)};
  size_t n = size_t(full.x) * full.y * full.z;
  if (n > kMostLanes) return "a threadgroup of more than 1024 threads";
  // Fibers stay where they are: lanes point to their own.
  l.fibers.reserve(n);
  auto stacks = mmap(
      nullptr, n * kStack, PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return "no memory for the stacks of the lanes";
  now = &l;
  {
    signals caught;
    run_all(full, static_cast<char*>(stacks), seed);
  }
  now = nullptr;
  munmap(stacks, n * kStack);
  error = l.error;
  return error.c_str();
}

} // namespace msl

// The compiler's own checks (-fsanitize=bounds and so on) report here instead of to libubsan, so
// that a fault is an error of one launch.
extern "C" {
struct checked {
  const char* file;
  uint32_t line, column;
};

static void report(const char* what, const checked* c) {
  msl::fail(what + std::string(" (") + c->file + ":" + std::to_string(c->line) + ")");
}
void __ubsan_handle_out_of_bounds(checked* c, void*) {
  report("an index outside an array", c);
}
void __ubsan_handle_type_mismatch_v1(checked* c, void*) {
  report("a misaligned access", c);
}
void __ubsan_handle_shift_out_of_bounds(checked* c, void*, void*) {
  report("a shift by more than a word's bits", c);
}
void __ubsan_handle_divrem_overflow(checked* c, void*, void*) {
  report("a division of integers by zero", c);
}
}
