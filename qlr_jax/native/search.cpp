// Which instruction set, the tables of a code, and many sequences over the threads of a caller.
#include "search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

namespace qlr {
namespace {

constexpr uint32_t kMultiplier = 2847382671u, kAddend = 1201005453u;  // of the hash that gives a state its value
constexpr int kPadding = 64;

struct Choice {
  const char* name;
  Search search;
};

// What this machine can run, the widest last.
const std::vector<Choice>& choices() {
  static const std::vector<Choice> all = [] {
    std::vector<Choice> found = {{"portable", search_portable}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) {
      found.push_back({"avx2", search_avx2});
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        found.push_back({"avx512", search_avx512});
    }
#elif defined(__aarch64__)
    found.push_back({"neon", search_neon});
#endif
    return found;
  }();
  return all;
}

constexpr int kLanes = 16;       // groups of fewer states are searched in float32, by every instruction set
constexpr double kFinest = 5;     // bits a weight; beyond, in float32 too: 16 bits cost up to 6e-4 there

// Costs in 16 bits are coarse where errors are small: at more bits a weight differences are doubled before they are squared, and
// so reach less far. Measured on Gaussian weights: at most 2e-4 more squared error.
int doublings_of(double rate) { return rate < 3 ? 0 : rate <= 4 ? 1 : 2; }

struct Memory {
  std::vector<uint16_t> small;
  std::vector<float> wide;
  std::vector<uint8_t> back;
  Room room;

  explicit Memory(int state_bits) {
    const size_t count = (size_t)1 << state_bits;
    small.resize(2 * (count + kPadding));
    wide.resize(2 * (count + kPadding));
    back.resize(kLength * (count / 2) + kPadding);
    room = {small.data(), small.data() + count + kPadding, wide.data(), wide.data() + count + kPadding, back.data()};
  }
};

// A code, and what a search reads of it.
struct Tables {
  Code code;
  std::vector<int32_t> shifts;
  std::vector<float> values;
  std::vector<int16_t> small_values;
  std::once_flag zeros_searched;
  int32_t of_zeros[kLength];

  Tables(const int32_t* given, float gain, int state_bits, bool exact) : shifts(given, given + kLength) {
    double rate = 0;
    for (int t = 0; t < kLength; t++) {
      rate += shifts[t] / (double)kLength;
      exact |= 1 << (state_bits - (shifts[t] < state_bits ? shifts[t] : state_bits)) < kLanes;
    }
    exact |= rate > kFinest;
    const int count = 1 << state_bits;
    values.resize(count);
    float largest = 0;
    for (int s = 0; s < count; s++) {
      const uint32_t word = (uint32_t)s * kMultiplier + kAddend;
      const int sum = (word & 255) + ((word >> 8) & 255) + ((word >> 16) & 255) + (word >> 24);
      values[s] = ((float)sum - 510.f) * (1.f / 147.8f) * gain;
      largest = std::fmax(largest, std::fabs(values[s]));
    }
    float scale = 0;
    if (!exact) {
      scale = std::fmin(8192.f, 32767.f / std::fmax(largest, 1e-6f));
      small_values.resize(count);
      for (int s = 0; s < count; s++) small_values[s] = (int16_t)std::lrint(values[s] * scale);
    }
    code = {state_bits, shifts.data(), scale, doublings_of(rate), values.data(), small_values.data()};
  }
};

// Sequences that are handed out one by one. The caller's thread takes part, so that it waits only for sequences that another
// thread has begun, never for a thread to come free: threads of a pool may call this side by side.
struct Work {
  Search search;
  int state_bits;
  std::vector<std::unique_ptr<Tables>> tables;  // of the codes that some sequence has
  const int32_t* of;
  const float* x;
  const int32_t* ends;
  int32_t* states;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;

  void run() {
    std::unique_ptr<Memory> memory;
    int64_t finished = 0;
    for (int64_t i; (i = next.fetch_add(1)) < count; finished++) {
      if (!memory) memory = std::make_unique<Memory>(state_bits);
      Tables& own = *tables[of ? of[i] : 0];
      const float* weights = x + i * kLength;
      // padding, and what only keeps shapes whole, is searched once
      if (ends[i] < 0 && std::all_of(weights, weights + kLength, [](float value) { return value == 0; })) {
        std::call_once(own.zeros_searched, [&] { search(own.code, weights, -1, own.of_zeros, memory->room); });
        std::memcpy(states + i * kLength, own.of_zeros, sizeof own.of_zeros);
        continue;
      }
      const int32_t end = ends[i] < 0 ? -1 : ends[i] & ((1 << state_bits) - 1);
      search(own.code, weights, end, states + i * kLength, memory->room);
    }
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    done += finished;
    if (done == count) all_done.notify_all();
  }
};

}  // namespace

Search search_of(const char* name) {
  for (const Choice& choice : choices())
    if (std::strcmp(choice.name, name) == 0) return choice.search;
  return nullptr;
}

const char* widest() { return choices().back().name; }

const char* search_all(Search search, const float* x, const Codes& codes, const int32_t* ends, int64_t count, int state_bits,
                       bool exact, int32_t* states, int helpers, const Spread& spread) {
  if (state_bits < kLeastBits || state_bits > kMostBits) return "state bits are 6 to 16";
  if (codes.codes < 1) return "there is a code";
  for (int64_t t = 0; t < codes.codes * kLength; t++)
    if (codes.shifts[t] < 1 || codes.shifts[t] > kMostShift) return "a step has 1 to 6 new bits";
  if (count == 0) return nullptr;
  auto work = std::make_shared<Work>();
  work->search = search, work->state_bits = state_bits, work->of = codes.of;
  work->x = x, work->ends = ends, work->states = states, work->count = count;
  work->tables.resize(codes.codes);
  for (int64_t i = 0; i < (codes.of ? count : 1); i++) {
    const int32_t own = codes.of ? codes.of[i] : 0;
    if (own < 0 || own >= codes.codes) return "a sequence has one of the codes";
    if (!work->tables[own])
      work->tables[own] = std::make_unique<Tables>(codes.shifts + own * kLength, codes.gains[own], state_bits, exact);
  }
  for (int64_t h = 0; h < helpers && h < count - 1; h++) spread([work] { work->run(); });
  work->run();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->all_done.wait(lock, [&] { return work->done == count; });
  return nullptr;
}

}  // namespace qlr

#define QLR_EXPORT extern "C" __attribute__((visibility("default")))

// Without JAX, on the caller's thread. `set`: an instruction set by name. 0, or 1: this machine has none of it, or no such code.
QLR_EXPORT int qlr_search(const char* set, const float* x, const int32_t* shifts, float gain, const int32_t* ends, int64_t count,
                          int state_bits, int exact, int32_t* states) {
  const qlr::Search search = qlr::search_of(set);
  if (search == nullptr) return 1;
  const qlr::Codes codes = {1, shifts, &gain, nullptr};
  return qlr::search_all(search, x, codes, ends, count, state_bits, exact != 0, states, 0, nullptr) != nullptr;
}

QLR_EXPORT const char* qlr_widest() { return qlr::widest(); }

// The digest of the sources that this was built of (native.digest).
QLR_EXPORT const char* qlr_sources() { return QLR_SOURCES; }
