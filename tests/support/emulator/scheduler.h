// Runs a CUDA kernel on a CPU: every thread of a block is a fiber, and one loop lets them go on in turn.
//
// A fiber runs until it waits (for its warp, its block or another block) or returns. What a warp does together is done
// by the last lane to arrive, for all 32. Without anybody who can go on, or where lanes meet at different operations,
// the launch ends with a message that names operation and line; nothing hangs.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <source_location>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 { unsigned x, y, z; };

namespace emulator {

using Where = std::source_location;
enum class State { ready, waiting, yielded, done };
struct Warp;
struct Block;

struct Fiber {
  dim3 thread;
  Block* block;
  Warp* warp;
  State state;
  const char* operation;  // where it waits
  Where where;
  void* argument;  // what it brought there
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
};

struct Warp {
  Fiber* lanes[32];
  int arrived;
};

struct Block {
  dim3 index;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived, finished;
  Fiber* first;  // of those at the barrier
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*kernel)(const void*);
  const void* params;
};

inline Fiber* current;
inline Launch launch;
inline std::string error;

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_bytes = 1 << 19;
#else
constexpr size_t stack_bytes = 1 << 17;
#endif
constexpr size_t guard_words = 1024;
constexpr uint32_t guard = 0xffc3ffc3u;  // a NaN to whoever reads it, as float or as bfloat16

#if defined(__x86_64__)
inline void* scheduler_stack_pointer;
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void to_fiber(Fiber& f) { emulator_switch(&scheduler_stack_pointer, f.stack_pointer); }
inline void to_scheduler(Fiber& f) { emulator_switch(&f.stack_pointer, scheduler_stack_pointer); }
#else
inline ucontext_t scheduler_context;
inline void to_fiber(Fiber& f) { swapcontext(&scheduler_context, &f.context); }
inline void to_scheduler(Fiber& f) { swapcontext(&f.context, &scheduler_context); }
#endif

inline void suspend(State state) {
  current->state = state;
  to_scheduler(*current);
}

inline void body() {
  launch.kernel(launch.params);
  current->state = State::done;
  current->block->finished++;
  to_scheduler(*current);
  abort();  // nobody resumes it
}

inline void prepare(Fiber& f, unsigned char* stack) {
#if defined(__x86_64__)
  // What emulator_switch pops: six registers and the address to go to, which finds the stack as a call leaves it.
  void** top = reinterpret_cast<void**>(stack + stack_bytes - 64);
  *top = reinterpret_cast<void*>(&body);
  f.stack_pointer = top - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = stack_bytes;
  makecontext(&f.context, &body, 0);
#endif
}

inline std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}
inline std::string text(const char* operation, const Where& where) {
  return std::string(operation) + " (" + where.file_name() + ":" + std::to_string(where.line()) + ")";
}

// Ends the launch from within a fiber.
[[noreturn]] inline void fail(const std::string& message) {
  error = "block " + text(current->block->index) + ", thread " + text(current->thread) + ": " + message;
  suspend(State::waiting);
  abort();
}

inline bool same(const Fiber& a, const Fiber& b) {
  return strcmp(a.operation, b.operation) == 0 && a.where.line() == b.where.line() &&
         strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

inline void arrive(const char* operation, const Where& where, const Fiber* first) {
  current->operation = operation;
  current->where = where;
  if (first && !same(*first, *current))
    fail("is at " + text(operation, where) + " while thread " + text(first->thread) + " is at " +
         text(first->operation, first->where));
}

// `perform(arguments)` sees the `argument` of all 32 lanes, in their order.
template <typename Argument, typename Perform>
void with_warp(const char* operation, const Where& where, Argument& argument, Perform perform) {
  Warp& warp = *current->warp;
  const Fiber* first = nullptr;
  for (Fiber* lane : warp.lanes) {
    if (lane->state == State::done)
      fail("is at " + text(operation, where) + " but thread " + text(lane->thread) + " of its warp has returned");
    if (!first && lane != current && lane->argument) first = lane;
  }
  arrive(operation, where, first);
  current->argument = &argument;
  if (++warp.arrived < 32) {
    suspend(State::waiting);
    return;
  }
  Argument* arguments[32];
  for (int i = 0; i < 32; i++) {
    arguments[i] = static_cast<Argument*>(warp.lanes[i]->argument);
    warp.lanes[i]->argument = nullptr;
    warp.lanes[i]->state = State::ready;
  }
  warp.arrived = 0;
  perform(arguments);
}

inline void release_barrier(Block& block) {
  for (Fiber& f : block.fibers)
    if (f.state == State::waiting && strcmp(f.operation, "sync_block") == 0) f.state = State::ready;
  block.arrived = 0;
  block.first = nullptr;
}

inline void with_block(const Where& where) {
  Block& block = *current->block;
  arrive("sync_block", where, block.first);
  if (!block.first) block.first = current;
  // Threads that have returned do not count, as on a GPU.
  if (++block.arrived + block.finished == static_cast<int>(block.fibers.size())) {
    release_barrier(block);
    current->state = State::ready;
  } else {
    suspend(State::waiting);
  }
}

inline std::string who_waits(const std::vector<Block>& blocks) {
  std::string all;
  for (const Block& block : blocks) {
    if (block.finished == static_cast<int>(block.fibers.size())) continue;
    std::map<std::string, int> counts;
    for (const Fiber& f : block.fibers)
      counts[f.state == State::done ? "have returned" : "wait at " + text(f.operation, f.where)]++;
    all += (all.empty() ? "block " : "; block ") + text(block.index) + ": of " + std::to_string(block.fibers.size());
    for (const auto& [what, count] : counts) all += ", " + std::to_string(count) + " " + what;
    if (all.size() > 2000) return all + " ...";
  }
  return all;
}

// Order 0 is that of the indices, 1 the reverse, any other a shuffle by that seed; a missing barrier shows in one.
inline std::vector<size_t> order_of(size_t n, unsigned seed) {
  std::vector<size_t> order(n);
  for (size_t i = 0; i < n; i++) order[i] = seed == 1 ? n - 1 - i : i;
  if (seed > 1)
    for (size_t i = n; i > 1; i--) {
      seed = seed * 1664525u + 1013904223u;
      std::swap(order[i - 1], order[(seed >> 8) % i]);
    }
  return order;
}

inline unsigned char* stacks(size_t count) {
  static unsigned char* pool;
  static size_t held;
  if (count > held) {
    if (pool) munmap(pool, held * stack_bytes);
    void* p = mmap(nullptr, count * stack_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    pool = p == MAP_FAILED ? nullptr : static_cast<unsigned char*>(p);
    held = pool ? count : 0;
  }
  return pool;
}

// All the given blocks at once.
inline void run_together(const std::vector<dim3>& indices, unsigned seed) {
  const size_t threads = launch.block.x;
  unsigned char* stack = stacks(indices.size() * threads);
  if (!stack) {
    error = "no memory for the stacks of " + std::to_string(indices.size()) + " blocks";
    return;
  }
  std::vector<Block> blocks(indices.size());
  std::vector<Fiber*> all;
  for (size_t b = 0; b < blocks.size(); b++) {
    Block& block = blocks[b];
    block.index = indices[b];
    block.memory.assign(launch.shared_bytes + guard_words * 4 + 32, 0xff);  // all bits set is NaN in every format
    block.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.memory.data()) + 15) & ~15ull);
    for (size_t i = 0; i < guard_words; i++) memcpy(block.shared + launch.shared_bytes + 4 * i, &guard, 4);
    block.fibers.resize(threads);
    block.warps.resize(threads / 32);
    for (size_t t = 0; t < threads; t++) {
      Fiber& f = block.fibers[t];
      f.thread = dim3{static_cast<unsigned>(t), 0, 0};
      f.block = &block;
      f.warp = &block.warps[t / 32];
      f.warp->lanes[t % 32] = &f;
      f.state = State::ready;
      f.operation = "start";
      prepare(f, stack + (b * threads + t) * stack_bytes);
      all.push_back(&f);
    }
  }
  const std::vector<size_t> order = order_of(all.size(), seed);
  size_t left = all.size();
  int idle = 0;
  while (left) {
    bool progress = false, yields = false;
    for (size_t i : order) {
      Fiber& f = *all[i];
      if (f.state != State::ready && f.state != State::yielded) continue;
      current = &f;
      f.state = State::ready;
      to_fiber(f);
      if (!error.empty()) return;
      yields |= f.state == State::yielded;
      progress |= f.state != State::yielded;
      if (f.state == State::done) {
        left--;
        Block& block = *f.block;
        if (block.arrived && block.arrived + block.finished == static_cast<int>(threads)) release_barrier(block);
      }
    }
    idle = progress ? 0 : idle + 1;
    if (left && !progress && (!yields || idle > 20000)) {
      error = (yields ? "blocks wait for each other for ever: " : "nobody can go on: ") + who_waits(blocks);
      return;
    }
  }
  for (Block& block : blocks)
    for (size_t i = 0; i < guard_words; i++)
      if (memcmp(block.shared + launch.shared_bytes + 4 * i, &guard, 4) != 0) {
        error = "block " + text(block.index) + " wrote past its " + std::to_string(launch.shared_bytes) +
                " bytes of shared memory, at byte " + std::to_string(launch.shared_bytes + 4 * i);
        return;
      }
}

inline const char* run(dim3 grid, unsigned threads, size_t shared_bytes, bool cooperative, unsigned seed) {
  launch.grid = grid;
  launch.block = dim3{threads, 1, 1};
  launch.shared_bytes = shared_bytes;
  error.clear();
  std::vector<dim3> together;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        together.push_back(dim3{x, y, z});
        if (cooperative) continue;
        run_together(together, seed);
        if (!error.empty()) return error.c_str();
        together.clear();
      }
  if (cooperative) run_together(together, seed);
  return error.c_str();
}

template <typename Params>
void call(void (*kernel)(Params), const void* params) { kernel(*static_cast<const Params*>(params)); }
template <typename Params>
constexpr size_t size_of_params(void (*)(Params)) { return sizeof(Params); }

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block->index)
#define gridDim (emulator::launch.grid)
#define blockDim (emulator::launch.block)

// The two functions that Python calls, for a kernel of this translation unit.
#define EMULATED_KERNEL(NAME)                                                                                  \
  extern "C" size_t emulator_params_bytes() { return emulator::size_of_params(&NAME); }                        \
  extern "C" const char* emulator_launch(unsigned x, unsigned y, unsigned z, unsigned threads, const void* p,  \
                                         size_t shared_bytes, int cooperative, unsigned seed) {                \
    emulator::launch.kernel = [](const void* params) { emulator::call(&NAME, params); };                       \
    emulator::launch.params = p;                                                                               \
    return emulator::run(dim3{x, y, z}, threads, shared_bytes, cooperative != 0, seed);                        \
  }
