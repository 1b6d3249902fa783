// Two Viterbi passes over one sequence, written once for all instruction sets.
//
// A step by k bits goes from state s to ((s << k) | new) mod 2^L. With rest = s mod 2^(L-k) the predecessors of the successors
// of `rest` are rest + i 2^(L-k): the least of their costs is found first, with neighbouring states in the lanes of a vector,
// then it is spread over the 2^k successors, each with its own distance. Costs are 16-bit integers that saturate; a sequence
// whose path does not close is searched again in float32.
//
// Included by one file for each instruction set, inside that file's target. All is local to that file: were a function shared,
// the linker could hand one that is compiled for AVX-512 to all of them.
#pragma once

#include <cstring>

#include "search.h"

namespace qlr {
namespace {

// Plain C++, eight lanes: what the others have to equal. `Half`: for groups of fewer states than lanes.
struct Portable {
  using Half = Portable;
  static constexpr int W = 8;
  struct V { uint16_t at[W]; };
  static V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
  static void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
  template <class F> static V each(F f) { V v; for (int i = 0; i < W; i++) v.at[i] = f(i); return v; }
  static V all(int x) { return each([=](int) { return (uint16_t)x; }); }
  static V min(V a, V b) { return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; }); }
  static V sub(V a, V b) { return each([&](int i) { return (uint16_t)(a.at[i] - b.at[i]); }); }
  static V add_saturated(V a, V b) {
    return each([&](int i) { int s = a.at[i] + b.at[i]; return (uint16_t)(s > 65535 ? 65535 : s); });
  }
  static int16_t clip(int x) { return (int16_t)(x > 32767 ? 32767 : x < -32768 ? -32768 : x); }
  static V add_signed(V a, V b) { return each([&](int i) { return (uint16_t)clip((int16_t)a.at[i] + (int16_t)b.at[i]); }); }
  static V sub_signed(V a, V b) { return each([&](int i) { return (uint16_t)clip((int16_t)a.at[i] - (int16_t)b.at[i]); }); }
  static V square_high(V a) { return each([&](int i) { return (uint16_t)(((int)(int16_t)a.at[i] * (int16_t)a.at[i]) >> 16); }); }
  // `index` where b < a, else `old`
  static V where_less(V b, V a, V index, V old) { return each([&](int i) { return b.at[i] < a.at[i] ? index.at[i] : old.at[i]; }); }
  static void store_bytes(uint8_t* p, V v) { for (int i = 0; i < W; i++) p[i] = (uint8_t)v.at[i]; }
  static int least(V v) { int m = v.at[0]; for (int i = 1; i < W; i++) m = v.at[i] < m ? v.at[i] : m; return m; }
  // lane i is p[i >> k]
  template <int k> static V spread(const uint16_t* p) { return each([=](int i) { return p[i >> k]; }); }
};

template <class Isa, int k>
inline int step(uint16_t* cost, uint16_t* best, uint8_t* back, const int16_t* values, int state_bits, int target, int taken,
                int doublings) {
  using V = typename Isa::V;
  constexpr int W = Isa::W;
  const int rests = 1 << (state_bits - k);
  const V less = Isa::all(taken);
  V least = Isa::all(65535);
  for (int r = 0; r < rests; r += W) {
    V found = Isa::load(cost + r), index = Isa::all(0);
    for (int i = 1; i < (1 << k); i++) {
      V other = Isa::load(cost + r + i * rests);
      if (back) index = Isa::where_less(other, found, Isa::all(i), index);
      found = Isa::min(found, other);
    }
    if (back) Isa::store_bytes(back + r, index);
    found = Isa::sub(found, less);
    least = Isa::min(least, found);
    Isa::store(best + r, found);
  }
  const V aim = Isa::all(target);
  for (int s = 0; s < (rests << k); s += W) {
    V away = Isa::sub_signed(aim, Isa::load(values + s));
    for (int d = 0; d < doublings; d++) away = Isa::add_signed(away, away);
    V reached = Isa::template spread<k>(best + (s >> k));
    Isa::store(cost + s, Isa::add_saturated(reached, Isa::square_high(away)));
  }
  return Isa::least(least);
}

template <class Isa, int k>
inline int advance(uint16_t* cost, uint16_t* best, uint8_t* back, const int16_t* values, int state_bits, int target, int taken,
                   int doublings) {
  if (1 << (state_bits - k) < Isa::W) return step<typename Isa::Half, k>(cost, best, back, values, state_bits, target, taken, doublings);
  return step<Isa, k>(cost, best, back, values, state_bits, target, taken, doublings);
}

// Eight floats, and what comes of comparing them: compilers make of them what the target has.
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(8)));

template <class T>
inline T read(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Isa, int k>
inline void advance_wide(float* cost, float* best, uint8_t* back, const float* values, int state_bits, float target) {
  const int rests = 1 << (state_bits - k);
  for (int r = 0; r < rests; r += 8) {
    Floats found = read<Floats>(cost + r);
    Ints index = {};
    for (int i = 1; i < (1 << k); i++) {
      const Floats other = read<Floats>(cost + r + i * rests);
      const Ints less = other < found;
      found = less ? other : found;
      index = less ? Ints{} + i : index;
    }
    const Bytes bytes = __builtin_convertvector(index, Bytes);
    std::memcpy(back + r, &bytes, sizeof bytes);
    std::memcpy(best + r, &found, sizeof found);
  }
  for (int s = 0; s < (rests << k); s += 8) {
    const float* from = best + (s >> k);
    Floats reached;
    if constexpr (k == 1)
      reached = Floats{from[0], from[0], from[1], from[1], from[2], from[2], from[3], from[3]};
    else if constexpr (k == 2)
      reached = Floats{from[0], from[0], from[0], from[0], from[1], from[1], from[1], from[1]};
    else
      reached = Floats{} + from[0];
    const Floats away = target - read<Floats>(values + s);
    reached += away * away;
    std::memcpy(cost + s, &reached, sizeof reached);
  }
}

template <class Isa, class T>
inline int32_t least_of(const T* cost, int count) {
  int32_t least = 0;
  for (int s = 1; s < count; s++) least = cost[s] < cost[least] ? s : least;
  return least;
}

// The states along the best path into `state`, from the last step down to `first`; returns the state before that.
template <class Isa>
inline int32_t trace(int32_t state, const Code& code, int turn, const Room& room, int first, int32_t* states) {
  const size_t stride = (size_t)1 << (code.state_bits - 1);
  for (int t = kLength - 1; t >= first; t--) {
    states[t] = state;
    const int k = code.shifts[(t + turn) % kLength];
    const int32_t rest = state >> k;
    state = rest | ((int32_t)room.back[t * stride + rest] << (code.state_bits - k));
  }
  return state;
}

// One pass: the first, with free ends and half a turn ahead (`end` < 0), gives the state that it passes through between the last
// step of the sequence and the first; the second starts and ends in `end`, fills `states`, and gives the state that it began in.
template <class Isa>
inline int32_t sweep(const Code& code, const float* x, int32_t end, int32_t* states, const Room& room) {
  const int bits = code.state_bits, count = 1 << bits;
  const int turn = end < 0 ? kLength / 2 : 0, first = end < 0 ? kLength / 2 : 0;
  const size_t stride = (size_t)1 << (bits - 1);
  std::memset(room.cost, end < 0 ? 0 : 255, sizeof(uint16_t) * count);
  if (end >= 0) room.cost[end] = 0;
  int taken = 0;
  for (int t = 0; t < kLength; t++) {
    const float aim = x[(t + turn) % kLength] * code.scale;
    const int target = !(aim > -32767.f) ? -32767 : aim > 32767.f ? 32767 : (int)(aim + (aim < 0 ? -0.5f : 0.5f));
    uint8_t* back = t < first ? nullptr : room.back + t * stride;  // no path is followed into the first half of the first pass
    switch (code.shifts[(t + turn) % kLength]) {
#define QLR_STEP(k) \
  case k: taken = advance<Isa, k>(room.cost, room.best, back, code.small_values, bits, target, taken, code.doublings); break;
      QLR_STEP(1) QLR_STEP(2) QLR_STEP(3) QLR_STEP(4) QLR_STEP(5) QLR_STEP(6)
#undef QLR_STEP
    }
  }
  return trace<Isa>(end < 0 ? least_of<Isa>(room.cost, count) : end, code, turn, room, first, states);
}

// The same in float32.
template <class Isa>
inline int32_t sweep_wide(const Code& code, const float* x, int32_t end, int32_t* states, const Room& room) {
  const int bits = code.state_bits, count = 1 << bits;
  const int turn = end < 0 ? kLength / 2 : 0, first = end < 0 ? kLength / 2 : 0;
  const size_t stride = (size_t)1 << (bits - 1);
  for (int s = 0; s < count; s++) room.wide_cost[s] = end < 0 || s == end ? 0.f : 1e30f;
  for (int t = 0; t < kLength; t++) {
    const float aim = x[(t + turn) % kLength];
    switch (code.shifts[(t + turn) % kLength]) {
#define QLR_STEP(k) \
  case k: advance_wide<Isa, k>(room.wide_cost, room.wide_best, room.back + t * stride, code.values, bits, aim); break;
      QLR_STEP(1) QLR_STEP(2) QLR_STEP(3) QLR_STEP(4) QLR_STEP(5) QLR_STEP(6)
#undef QLR_STEP
    }
  }
  return trace<Isa>(end < 0 ? least_of<Isa>(room.wide_cost, count) : end, code, turn, room, first, states);
}

template <class Isa>
inline void search(const Code& code, const float* x, int32_t end, int32_t* states, const Room& room) {
  if (code.scale > 0) {
    const int32_t known = end < 0 ? sweep<Isa>(code, x, end, states, room) : end;
    if (sweep<Isa>(code, x, known, states, room) == known) return;
  }
  const int32_t known = end < 0 ? sweep_wide<Isa>(code, x, end, states, room) : end;
  sweep_wide<Isa>(code, x, known, states, room);
}

}  // namespace
}  // namespace qlr
