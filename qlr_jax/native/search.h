// The trellis search of core/quantizers/trellis.py for a CPU: what its parts share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace qlr {

constexpr int kLength = 256;    // weights a sequence
constexpr int kMostShift = 6;   // new bits a step, at most
constexpr int kLeastBits = 6, kMostBits = 16;  // of a state

// What all sequences of one call share.
struct Code {
  int state_bits;               // L
  const int32_t* shifts;        // new bits of each of the 256 weights
  float scale;                  // 16-bit targets and values are this many to one unit; 0: float32 throughout
  int doublings;                // of their difference before it is squared: finer costs, of a shorter reach
  const float* values;          // of every state
  const int16_t* small_values;  // the same times `scale`, rounded
};

// Room for one sequence at a time; one for each thread.
struct Room {
  uint16_t *cost, *best;  // 2^L, and a vector's length that may be read or written beyond
  float *wide_cost, *wide_best;
  uint8_t* back;          // [256][2^(L-1)]: the oldest bits of the best predecessor
};

// One sequence: x[256] -> states[256]; `end` is its tail-biting state, negative where it is not known.
using Search = void (*)(const Code&, const float* x, int32_t end, int32_t* states, const Room&);

// By instruction set. Each gives what `search_portable` gives, to the bit.
void search_portable(const Code&, const float*, int32_t, int32_t*, const Room&);
void search_avx2(const Code&, const float*, int32_t, int32_t*, const Room&);
void search_avx512(const Code&, const float*, int32_t, int32_t*, const Room&);
void search_neon(const Code&, const float*, int32_t, int32_t*, const Room&);

// The search of this machine's widest instruction set, or of the one named; null where this machine or build has none of it.
Search search_of(const char* name);
const char* widest();

// Runs the task on other threads too: once for each call of it that a thread is there for, at any time, or never.
using Spread = std::function<void(std::function<void()>)>;

// The codes that sequences may have: shifts[codes][256] and gains[codes]; of[count] says which, null: the first.
struct Codes {
  int64_t codes;
  const int32_t* shifts;
  const float* gains;
  const int32_t* of;
};

// x[count][256] -> states[count][256]; null, or what is wrong. `helpers`: how many other threads may help.
const char* search_all(Search search, const float* x, const Codes& codes, const int32_t* ends, int64_t count, int state_bits,
                       bool exact, int32_t* states, int helpers, const Spread& spread);

}  // namespace qlr
