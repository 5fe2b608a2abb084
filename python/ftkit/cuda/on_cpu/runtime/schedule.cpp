// Who runs when: blocks one after another, a block's threads as fibers, and what they wait for.
//
// A dropped barrier may leave no trace in the values when threads take turns; it does when one warp runs ahead until
// it must wait. So a launch has a schedule: 0 in turn, 1 a random warp runs ahead, 2 the last warp runs ahead, 3 in
// turn with random switches between accesses. Blocks are shuffled in all but the first.
#include "runtime.h"

#include <algorithm>
#include <numeric>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "fibers.h"

namespace on_cpu {

std::vector<Thread> threads;
Warp warps[MAX_WARPS];
Thread* current;
Block block;
bool aborting, counting_traffic;
int preemption;
Counters counters;

enum Schedule { IN_TURN, RUN_AHEAD, RUN_AHEAD_FROM_LAST, PREEMPTED };
static const char* const ENDED_LANES = "warp operation with lanes that have ended";
static std::vector<Fault> faults;
static uint64_t random_state;
static void* scheduler;
static char* stacks;
static void (*entry)(void**);
static void** entry_arguments;

uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (uint32_t)(random_state >> 16);
}

void yield() {
  counters.switches++;
  switch_stack(&current->stack_pointer, scheduler);
}

void stop() {
  aborting = true;
  for (;;) yield();
}

void report(const char* kind, uint64_t pc, uint64_t other_pc, const char* format, ...) {
  for (const Fault& known : faults)
    if (known.pc == pc && known.other_pc == other_pc && !strcmp(known.kind, kind)) return;
  if (faults.size() == 64) return;
  Fault fault{};
  snprintf(fault.kind, sizeof fault.kind, "%s", kind);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(fault.detail, sizeof fault.detail, format, arguments);
  va_end(arguments);
  memcpy(fault.block, block.index, sizeof fault.block);
  fault.thread = current ? current->number : -1;
  fault.pc = pc;
  fault.other_pc = other_pc;
  faults.push_back(fault);
}

// Lets the block pass its barrier when every thread that still runs has come to it.
static bool release_barrier() {
  int waiting = 0, running = 0;
  uint64_t place = 0, other = 0;
  for (const Thread& thread : threads) {
    running += thread.state != DONE;
    if (thread.state != AT_BARRIER) continue;
    waiting++;
    if (place && place != thread.pc) other = thread.pc;
    place = thread.pc;
  }
  if (!waiting || waiting < running) return false;
  if (other) report("barrier reached from different places", place, other, "");
  uint32_t newest[MAX_WARPS] = {};
  for (int w = 0; w < block.warps; w++) {
    warps[w].seen[w] = ++warps[w].clock;
    for (int k = 0; k < block.warps; k++) newest[k] = std::max(newest[k], warps[w].seen[k]);
  }
  for (int w = 0; w < block.warps; w++) memcpy(warps[w].seen, newest, sizeof newest);
  for (Thread& thread : threads)
    if (thread.state == AT_BARRIER) thread.state = READY;
  counters.barriers++;
  return true;
}

static void run_thread() {
  entry(entry_arguments);
  for (const auto& group : current->groups) current->open.insert(current->open.end(), group.begin(), group.end());
  if (!current->open.empty()) report("thread ended with copies in flight", current->open.front().pc, 0, "");
  current->state = DONE;
  warps[current->warp].alive &= ~(1u << current->lane);
  for (const Thread& other : threads)
    if (other.warp == current->warp && other.state == IN_WARP_OPERATION && other.mask >> current->lane & 1) {
      report(ENDED_LANES, other.pc, 0, "lane %d", current->lane);
      stop();
    }
  release_barrier();
  for (;;) yield();
}

static void start_threads() {
  memset(warps, 0, sizeof warps);
  for (Warp& warp : warps) warp.clock = 1;
  for (int number = 0; number < block.threads; number++) {
    Thread& thread = threads[number];
    const unsigned* size = block.launch.block;
    thread.number = number;
    thread.lane = number % WARP;
    thread.warp = number / WARP;
    thread.state = READY;
    thread.index[0] = number % size[0];
    thread.index[1] = number / size[0] % size[1];
    thread.index[2] = number / size[0] / size[1];
    thread.open.clear();
    thread.groups.clear();
    thread.times.clear();
    thread.stack = stacks + STACK_BYTES * number;
    thread.stack_pointer = new_stack(thread.stack, STACK_BYTES, run_thread);
    warps[thread.warp].alive |= 1u << thread.lane;
  }
}

// One turn of a warp's lanes; true where one of them ran.
static bool run_warp(int warp, bool in_order) {
  int start = in_order ? 0 : random_bits() % WARP, stride = in_order ? 1 : random_bits() % WARP | 1;
  bool ran = false;
  for (int i = 0; i < WARP && !aborting; i++) {
    int number = warp * WARP + (start + i * stride) % WARP;
    if (number >= block.threads || threads[number].state != READY) continue;
    ran = true;
    current = &threads[number];
    switch_stack(&scheduler, current->stack_pointer);
    current = nullptr;
  }
  return ran;
}

template <class T>
static void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[random_bits() % i]);
}

static void run_block() {
  unsigned schedule = block.launch.schedule;
  bool runs_ahead = schedule == RUN_AHEAD || schedule == RUN_AHEAD_FROM_LAST;
  std::vector<int> order(block.warps);
  std::iota(order.begin(), order.end(), 0);
  if (schedule == RUN_AHEAD_FROM_LAST) std::reverse(order.begin(), order.end());
  clear_shared();
  start_threads();
  while (!aborting) {
    if (schedule == RUN_AHEAD || schedule == PREEMPTED) shuffle(order);
    bool progress = false;
    for (int warp : order) {
      bool ran = run_warp(warp, schedule == IN_TURN);
      progress |= ran;
      while (ran && runs_ahead && !aborting) ran = run_warp(warp, false);
    }
    if (progress || aborting) continue;
    const Thread* stuck = nullptr;
    uint64_t other = 0;
    int left = 0;
    for (const Thread& thread : threads) {
      if (thread.state == DONE) continue;
      left++;
      if (!stuck) stuck = &thread;
      if (thread.pc != stuck->pc) other = thread.pc;
    }
    if (!left) break;
    report("deadlock", stuck->pc, other, "%d threads wait for ever, thread %d among them", left, stuck->number);
    aborting = true;
  }
  if (counting_traffic) count_block();
}

}  // namespace on_cpu
using namespace on_cpu;

EXPORT unsigned on_cpu_index(int which) {
  if (which < ON_CPU_BLOCK) return current->index[which];
  if (which < ON_CPU_BLOCK_SIZE) return block.index[which - ON_CPU_BLOCK];
  if (which < ON_CPU_GRID_SIZE) return block.launch.block[which - ON_CPU_BLOCK_SIZE];
  return which < ON_CPU_LANE ? block.launch.grid[which - ON_CPU_GRID_SIZE] : current->lane;
}

EXPORT void on_cpu_barrier(void) {
  current->pc = CALLER;
  current->state = AT_BARRIER;
  if (!release_barrier() || random_bits() & 1) yield();
}

EXPORT void on_cpu_warp(int operation, void* arguments, unsigned mask) {
  Warp& warp = warps[current->warp];
  Thread* lanes = &threads[current->warp * WARP];
  current->pc = CALLER;
  current->operation = operation;
  current->arguments = arguments;
  current->mask = mask;
  int lanes_here = std::min(WARP, block.threads - current->warp * WARP);
  uint32_t expected = mask & (lanes_here == WARP ? ~0u : (1u << lanes_here) - 1);
  if (!(mask >> current->lane & 1)) {
    report("lane not in its own mask", CALLER, 0, "mask %08x", mask);
    stop();
  }
  if (expected & ~warp.alive) {
    report(ENDED_LANES, CALLER, 0, "mask %08x, alive %08x", mask, warp.alive);
    stop();
  }
  if (operation >= ON_CPU_LDMATRIX && expected != ~0u) {
    report("whole-warp operation in a part of a warp", CALLER, 0, "lanes %08x", expected);
    stop();
  }
  warp.arrived |= 1u << current->lane;
  current->state = IN_WARP_OPERATION;
  if ((warp.arrived & mask) != expected) return yield();
  for (int lane = 0; lane < WARP; lane++) {
    if (!(expected >> lane & 1)) continue;
    const Thread& other = lanes[lane];
    if (other.operation == operation && other.mask == mask && other.pc == current->pc) continue;
    report("divergent warp operation", current->pc, other.pc, "lane %d", lane);
    stop();
  }
  execute(operation, lanes, expected);
  if (aborting) stop();
  warp.arrived &= ~mask;
  for (int lane = 0; lane < WARP; lane++)
    if (expected >> lane & 1) lanes[lane].state = READY;
  if (operation == ON_CPU_SYNC) warp.seen[current->warp] = ++warp.clock;  // the others order no memory
  if (random_bits() & 1) yield();
}

EXPORT int on_cpu_run(void (*kernel_entry)(void**), void** arguments, const OnCpuLaunch* launch, const void* kernel,
                      char* shared_start, char* shared_end) {
  block.launch = *launch;
  block.threads = launch->block[0] * launch->block[1] * launch->block[2];
  block.warps = (block.threads + WARP - 1) / WARP;
  if (block.threads > MAX_THREADS || launch->shared_bytes > MAX_DYNAMIC_SHARED) return -1;
  block.shared_start = shared_start;
  block.shared_end = shared_end;
  entry = kernel_entry;
  entry_arguments = arguments;
  aborting = false;
  counting_traffic = launch->traffic;
  preemption = launch->schedule == PREEMPTED ? 61 : 0;
  random_state = 0x9e3779b97f4a7c15ull * (launch->seed + 1);
  find_image(kernel);
  if (!stacks)
    stacks = (char*)mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  threads.assign(block.threads, Thread());
  std::vector<uint32_t> order(launch->grid[0] * launch->grid[1] * launch->grid[2]);
  std::iota(order.begin(), order.end(), 0);
  if (launch->schedule != IN_TURN) shuffle(order);
  for (uint32_t number : order) {
    block.number = number;
    block.index[0] = number % launch->grid[0];
    block.index[1] = number / launch->grid[0] % launch->grid[1];
    block.index[2] = number / launch->grid[0] / launch->grid[1];
    run_block();
    if (aborting) break;
  }
  current = nullptr;
  counting_traffic = false;
  return (int)faults.size();
}

EXPORT void on_cpu_reset(void) {
  buffers.clear();
  faults.clear();
  counters = Counters();
  forget_traffic();
}
EXPORT void on_cpu_buffer(void* start, size_t bytes, int writable) {
  buffers.push_back({(char*)start, bytes, writable != 0, std::vector<Byte>(writable ? bytes : 0)});
}
EXPORT int on_cpu_faults(Fault* out, int most) {
  std::copy(faults.begin(), faults.begin() + std::min<size_t>(most, faults.size()), out);
  return (int)faults.size();
}
EXPORT void on_cpu_counters(Counters* out) { *out = counters; }
