// Every load and store of a kernel: bounds, constness, alignment, what was never written, and races.
//
// A race is found by clocks, not by luck: two accesses to a byte, one of them a write, by different threads, with no
// barrier (or, in one warp, no __syncwarp) between them. Across blocks nothing is ordered.
#include "runtime.h"

#include <link.h>
#include <string.h>

namespace on_cpu {

std::vector<Buffer> buffers;
static std::vector<Byte> static_shadow, dynamic_shadow;
alignas(1024) static char dynamic_shared[MAX_DYNAMIC_SHARED];
struct Range {
  const char *start, *end;
};
static std::vector<Range> image;  // the kernel's own code and constants

static bool ordered_before_now(const Mark& mark) {
  if (mark.block != block.number) return false;
  if (mark.thread == current->number) return true;
  int warp = mark.thread / WARP;
  return mark.clock < (warp == current->warp ? warps[warp].clock : warps[current->warp].seen[warp]);
}

static void touch(std::vector<Byte>& shadow, size_t offset, int bytes, bool is_write, uint64_t pc, bool is_shared) {
  const char* where = is_shared ? "shared" : "global";
  Mark now{warps[current->warp].clock, block.number, current->number, pc};
  auto race = [&](const Mark& mark, const char* how, size_t at) {
    if (!mark.clock || ordered_before_now(mark)) return false;
    if (mark.block == block.number)
      report("race", pc, mark.pc, "%s, byte %zu of %s memory, with thread %d", how, at, where, mark.thread);
    else
      report("race", pc, mark.pc, "%s, byte %zu of %s memory, with block number %u", how, at, where, mark.block);
    return true;
  };
  for (size_t at = offset; at < offset + bytes; at++) {
    Byte& byte = shadow[at];
    if (is_write) {
      race(byte.write, "write after write", at);
      race(byte.read, "write after read", at) || race(byte.other_read, "write after read", at);
      byte.write = now;
      byte.read = byte.other_read = Mark();
      byte.content = WRITTEN;
    } else {
      if (is_shared && byte.content == NEVER_WRITTEN) report("read of nothing", pc, 0, "byte %zu of shared memory", at);
      if (byte.content == IN_FLIGHT) report("read of a copy in flight", pc, byte.write.pc, "byte %zu of shared memory", at);
      race(byte.write, "read after write", at);
      if (byte.read.thread / WARP != now.thread / WARP || byte.read.block != now.block) byte.other_read = byte.read;
      byte.read = now;
    }
  }
}

// The shadow of a byte of shared memory, and its place there; null for other addresses.
static std::vector<Byte>* shared_place(const char* address, size_t& offset) {
  if (address >= dynamic_shared && address < dynamic_shared + MAX_DYNAMIC_SHARED) {
    offset = address - dynamic_shared;
    return &dynamic_shadow;
  }
  if (address >= block.shared_start && address < block.shared_end) {
    offset = address - block.shared_start;
    return &static_shadow;
  }
  return nullptr;
}

void access(const void* pointer, int bytes, bool is_write, uint64_t pc, Purpose purpose) {
  if (!current || aborting) return;
  const char* address = (const char*)pointer;
  if (address >= current->stack && address < current->stack + STACK_BYTES) return;
  Kind kind;
  size_t offset;
  if (std::vector<Byte>* shadow = shared_place(address, offset)) {
    if (offset + bytes > shadow->size()) {
      report("out of bounds", pc, 0, "%d bytes at %zu of %zu of shared memory", bytes, offset, shadow->size());
      stop();
    }
    touch(*shadow, offset, bytes, is_write, pc, true);
    kind = is_write ? STORE_SHARED : LOAD_SHARED;
  } else {
    Buffer* found = nullptr;
    for (Buffer& buffer : buffers)
      if (address >= buffer.start && address + bytes <= buffer.start + buffer.bytes) found = &buffer;
    if (!found) {
      for (const Range& range : image)
        if (!is_write && address >= range.start && address + bytes <= range.end) return;
      report("out of bounds", pc, 0, "%s of %d bytes of global memory", is_write ? "write" : "read", bytes);
      stop();
    }
    if (is_write && !found->writable) {
      report("write to const", pc, 0, "%d bytes", bytes);
      stop();
    }
    if (found->writable) touch(found->shadow, address - found->start, bytes, is_write, pc, false);
    (is_write ? counters.stored_bytes : counters.loaded_bytes) += bytes;
    kind = is_write ? STORE_GLOBAL : LOAD_GLOBAL;
  }
  counters.accesses++;
  if ((bytes & (bytes - 1)) == 0 && (uintptr_t)address % bytes)
    report("misaligned", pc, 0, "%d bytes at an address that is %d modulo 16", bytes, (int)((uintptr_t)address % 16));
  if (counting_traffic && purpose == PLAIN) note_access(pc, (uint64_t)address, bytes, kind);
  if (preemption && kind <= STORE_SHARED && random_bits() % preemption == 0) yield();
}

void clear_shared() {
  size_t static_bytes = block.shared_end - block.shared_start;
  static_shadow.assign(static_bytes, Byte());
  dynamic_shadow.assign(block.launch.shared_bytes, Byte());
  if (static_bytes) memset(block.shared_start, 0xff, static_bytes);  // NaN, in every floating-point type
  memset(dynamic_shared, 0xff, block.launch.shared_bytes);
}

void find_image(const void* kernel) {
  image.clear();
  auto look = [](dl_phdr_info* object, size_t, void* kernel) {
    std::vector<Range> ranges;
    bool ours = false;
    for (int i = 0; i < object->dlpi_phnum; i++) {
      if (object->dlpi_phdr[i].p_type != PT_LOAD) continue;
      const char* start = (const char*)object->dlpi_addr + object->dlpi_phdr[i].p_vaddr;
      ranges.push_back({start, start + object->dlpi_phdr[i].p_memsz});
      ours |= kernel >= start && kernel < ranges.back().end;
    }
    if (ours) image = ranges;
    return (int)ours;
  };
  dl_iterate_phdr(look, (void*)kernel);
}

static void land(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.source_bytes);
  memset(copy.to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

}  // namespace on_cpu
using namespace on_cpu;

EXPORT void on_cpu_access(const void* address, int bytes, int is_write) { access(address, bytes, is_write, CALLER); }
EXPORT void* on_cpu_dynamic_shared(void) { return dynamic_shared; }

EXPORT void on_cpu_copy_async(void* to, const void* from, int bytes, int source_bytes) {
  size_t offset;
  std::vector<Byte>* shadow = shared_place((char*)to, offset);
  if (!shadow) {
    report("out of bounds", CALLER, 0, "an asynchronous copy to what is not shared memory");
    stop();
  }
  if (source_bytes) access(from, source_bytes, false, CALLER);
  access(to, bytes, true, CALLER);
  Copy copy{(char*)to, (const char*)from, bytes, source_bytes, CALLER, (random_bits() & 1) != 0};
  if (copy.landed)
    land(copy);
  else
    memset(to, 0xff, bytes);
  for (int i = 0; i < bytes; i++) (*shadow)[offset + i].content = IN_FLIGHT;
  current->open.push_back(copy);
}

EXPORT void on_cpu_copy_commit(void) {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

EXPORT void on_cpu_copy_wait(int groups) {
  while ((int)current->groups.size() > groups) {
    for (const Copy& copy : current->groups.front()) {
      if (!copy.landed) land(copy);
      size_t offset;
      std::vector<Byte>* shadow = shared_place(copy.to, offset);
      touch(*shadow, offset, copy.bytes, true, copy.pc, true);  // only now others may be told of it
    }
    current->groups.erase(current->groups.begin());
  }
}

// What g++ calls under -fsanitize=thread. We are not linked to the sanitizer's own library.
#define SIZE(n)                                                                                \
  EXPORT void __tsan_read##n(void* address) { access(address, n, false, CALLER); }             \
  EXPORT void __tsan_write##n(void* address) { access(address, n, true, CALLER); }             \
  EXPORT void __tsan_unaligned_read##n(void* address) { access(address, n, false, CALLER); }   \
  EXPORT void __tsan_unaligned_write##n(void* address) { access(address, n, true, CALLER); }
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
EXPORT void __tsan_read_range(void* address, size_t bytes) { access(address, (int)bytes, false, CALLER); }
EXPORT void __tsan_write_range(void* address, size_t bytes) { access(address, (int)bytes, true, CALLER); }
EXPORT void __tsan_init(void) {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit(void) {}
EXPORT void __tsan_vptr_update(void**, void*) {}
