// Bank conflicts of shared memory and 32-byte sectors of global memory, for each place in the source.
//
// The accesses of a warp's lanes at one place, for the same time of passing it, are one request. Shared memory has 32
// banks of 4 bytes and serves a request of 4, 8 or 16 bytes a lane in 1, 2 or 4 rounds; a round takes as many cycles
// as the busiest bank has different words. A request to global memory takes as many sectors as it touches.
#include "runtime.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace on_cpu {

struct Access {
  uint64_t pc;
  uint32_t times;
  uint16_t warp;
  Kind kind;
  uint8_t lane, bytes;
  uint64_t address;
};
// needed: cycles or sectors that were taken; least: that the same bytes could have taken
struct Traffic {
  uint64_t requests, taken, least, bytes;
};
static std::vector<Access> accesses;
static std::map<std::pair<uint64_t, int>, Traffic> places;

void note_access(uint64_t pc, uint64_t address, int bytes, Kind kind) {
  accesses.push_back({pc, current->times[pc]++, current->warp, kind, (uint8_t)current->lane, (uint8_t)bytes, address});
}

static int busiest_bank(std::vector<uint64_t>& words) {
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  int banks[32] = {}, most = 0;
  for (uint64_t word : words) most = std::max(most, ++banks[word % 32]);
  return most;
}

void note_ldmatrix(uint64_t pc, const uint64_t (&rows)[8]) {
  std::vector<uint64_t> words;
  for (uint64_t row : rows)
    for (int word = 0; word < 4; word++) words.push_back(row / 4 + word);
  Traffic& traffic = places[{pc, LDMATRIX}];
  traffic.requests++;
  traffic.taken += busiest_bank(words);
  traffic.least++;
  traffic.bytes += 128;
}

static void count_request(const Access* first, const Access* end) {
  Traffic& traffic = places[{first->pc, first->kind}];
  traffic.requests++;
  std::vector<uint64_t> touched;
  for (const Access* one = first; one < end; one++) traffic.bytes += one->bytes;
  if (first->kind <= STORE_SHARED) {
    int lanes = first->bytes <= 4 ? 32 : first->bytes == 8 ? 16 : 8;
    for (int start = 0; start < WARP; start += lanes) {
      touched.clear();
      for (const Access* one = first; one < end; one++)
        if (one->lane >= start && one->lane < start + lanes)
          for (int word = 0; word < std::max(1, one->bytes / 4); word++) touched.push_back(one->address / 4 + word);
      if (touched.empty()) continue;
      traffic.taken += busiest_bank(touched);
      traffic.least++;
    }
  } else {
    std::vector<uint64_t> bytes;
    for (const Access* one = first; one < end; one++)
      for (int i = 0; i < one->bytes; i++) bytes.push_back(one->address + i);
    std::sort(bytes.begin(), bytes.end());
    bytes.erase(std::unique(bytes.begin(), bytes.end()), bytes.end());
    for (uint64_t byte : bytes)
      if (touched.empty() || touched.back() != byte / 32) touched.push_back(byte / 32);
    traffic.taken += touched.size();
    traffic.least += (bytes.size() + 31) / 32;
  }
}

void count_block() {
  auto request = [](const Access& a) { return std::tie(a.warp, a.pc, a.times, a.kind); };
  std::sort(accesses.begin(), accesses.end(), [&](const Access& a, const Access& b) {
    return std::make_pair(request(a), a.lane) < std::make_pair(request(b), b.lane);
  });
  for (size_t start = 0, end; start < accesses.size(); start = end) {
    for (end = start; end < accesses.size() && request(accesses[end]) == request(accesses[start]);) end++;
    count_request(&accesses[start], accesses.data() + end);
  }
  accesses.clear();
}

void forget_traffic() {
  accesses.clear();
  places.clear();
}

}  // namespace on_cpu
using namespace on_cpu;

// Rows of [pc, kind, requests, taken, least, bytes]; returns how many there are.
EXPORT int on_cpu_traffic(uint64_t* rows, int most) {
  int count = 0;
  for (const auto& [place, traffic] : places) {
    if (count == most) break;
    const uint64_t row[] = {place.first, (uint64_t)place.second, traffic.requests, traffic.taken, traffic.least, traffic.bytes};
    std::copy(row, row + 6, rows + 6 * count++);
  }
  return (int)places.size();
}
