// What the parts of the emulator share: the threads of the running block, its clocks, faults and counters.
#pragma once
#include "../include/on_cpu.h"
#undef __shared__
#undef __constant__
#undef __device__
#undef __global__
#undef __forceinline__

#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define CALLER ((uint64_t)__builtin_return_address(0))

namespace on_cpu {

constexpr int MAX_THREADS = 1024, WARP = 32, MAX_WARPS = MAX_THREADS / WARP;
constexpr size_t STACK_BYTES = 64 << 10, MAX_DYNAMIC_SHARED = 227 << 10;

enum State : uint8_t { READY, AT_BARRIER, IN_WARP_OPERATION, DONE };

// A piece of cp.async. `landed`: the schedule had it happen at once; else it happens when it is waited for.
struct Copy {
  char* to;
  const char* from;
  int bytes, source_bytes;
  uint64_t pc;
  bool landed;
};

struct Thread {
  void* stack_pointer;
  char* stack;
  State state;
  uint16_t number, lane, warp;
  uint32_t index[3];
  uint64_t pc;  // where it waits
  int operation;
  void* arguments;
  uint32_t mask;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::unordered_map<uint64_t, uint32_t> times;  // how often it passed a place, where traffic is counted
};

// `clock` counts the warp's synchronisations; `seen[w]` is the clock of warp w that a barrier has made visible.
struct Warp {
  uint32_t alive, arrived, clock, seen[MAX_WARPS];
};

// One access to a byte, dated by the clock of its warp; clock 0: none.
struct Mark {
  uint32_t clock = 0, block = 0;
  uint16_t thread = 0;
  uint64_t pc = 0;
};
enum Content : uint8_t { NEVER_WRITTEN, WRITTEN, IN_FLIGHT };
struct Byte {
  Mark write, read, other_read;  // two readers of different warps are enough to find one that a write races with
  Content content = NEVER_WRITTEN;
};

struct Buffer {
  char* start;
  size_t bytes;
  bool writable;
  std::vector<Byte> shadow;
};

struct Fault {
  char kind[48], detail[160];
  uint32_t block[3];
  int32_t thread;
  uint64_t pc, other_pc;
};

struct Counters {
  uint64_t accesses, switches, mma, barriers, ldmatrix, loaded_bytes, stored_bytes;
};

struct Block {
  OnCpuLaunch launch;
  uint32_t index[3], number;
  int threads, warps;
  char *shared_start, *shared_end;
};

extern std::vector<Thread> threads;
extern Warp warps[MAX_WARPS];
extern Thread* current;  // null between threads
extern Block block;
extern bool aborting, counting_traffic;
extern int preemption;  // a switch after one in so many accesses to shared memory; 0: never
extern Counters counters;
extern std::vector<Buffer> buffers;

uint32_t random_bits();
void yield();
[[noreturn]] void stop();  // the launch ends here: what follows would be noise
void report(const char* kind, uint64_t pc, uint64_t other_pc, const char* format, ...);

// memory.cpp
enum Purpose { PLAIN, ROW_OF_LDMATRIX };
void access(const void* address, int bytes, bool is_write, uint64_t pc, Purpose purpose = PLAIN);
void clear_shared();
void find_image(const void* kernel);
// traffic.cpp
enum Kind : uint8_t { LOAD_SHARED, STORE_SHARED, LOAD_GLOBAL, STORE_GLOBAL, LDMATRIX };
void note_access(uint64_t pc, uint64_t address, int bytes, Kind kind);
void note_ldmatrix(uint64_t pc, const uint64_t (&rows)[8]);
void count_block();
void forget_traffic();
// warp.cpp
void execute(int operation, Thread* lanes, uint32_t mask);

}  // namespace on_cpu
