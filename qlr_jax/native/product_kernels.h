// Products with packed rows, written once for all instruction sets: 16 lanes, whose sums are added in one order.
//
// A trellis backbone has neighbouring rows in its lanes: a sequence covers `height` rows and 256 / height columns, and a value is
// affine in the sum of the four bytes of a 32-bit product (the state's hash), so that decoding is a few instructions and no table.
// All else has 16 neighbouring columns of one row in its lanes.
//
// Included by one file for each instruction set, inside that file's target. All is local to that file: were a function shared,
// the linker could hand one that is compiled for AVX-512 to all of them.
#pragma once

#include <cstring>

#include "product.h"

#define QLR_APART __attribute__((noinline))  // a loop of its own, with all registers to itself
#if defined(__clang__)
#define QLR_UNROLL _Pragma("unroll")
#else
#define QLR_UNROLL _Pragma("GCC unroll 8")
#endif

namespace qlr {
namespace {

constexpr uint32_t kMultiplier = 2847382671u, kAddend = 1201005453u;  // of the hash that gives a state its value
constexpr float kMiddle = 510.f;                                      // of the sum of its bytes

// Plain C++: what the others have to equal.
struct Plain {
  static constexpr int kRows = 2, kTokens = 2;  // of a block of `dense`: what registers hold
  struct F { float at[16]; };
  struct I { uint32_t at[16]; };
  template <class M> static F each(M make) { F v; for (int i = 0; i < 16; i++) v.at[i] = make(i); return v; }
  template <class M> static I each_word(M make) { I v; for (int i = 0; i < 16; i++) v.at[i] = make(i); return v; }
  static F zero() { return each([](int) { return 0.f; }); }
  static F all(float x) { return each([=](int) { return x; }); }
  static F load(const float* p) { return each([=](int i) { return p[i]; }); }
  static void store(float* p, F v) { std::memcpy(p, v.at, sizeof v.at); }
  // four neighbouring columns of 16 rows
  static void store_columns(float* p, int64_t stride, const F* v) {
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 4; k++) p[i * stride + k] = v[k].at[i];
  }
  static F sub(F a, F b) { return each([&](int i) { return a.at[i] - b.at[i]; }); }
  static F mul(F a, F b) { return each([&](int i) { return a.at[i] * b.at[i]; }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); }); }
  struct Source { const uint8_t* bytes; int64_t count; };  // a trellis sequence
  static Source open(const uint8_t* bytes, int64_t count) { return {bytes, count}; }
  static I words(const Source& s, const Words& w) {
    return each_word([&](int i) { return word_at(s.bytes, w.from[i], s.count); });
  }
  static I inner_words(const Source& s, const Words& w) { return words(s, w); }  // of no lane that wraps
  static uint32_t word_at(const uint8_t* bytes, int64_t from, int64_t count) {  // the first byte is the highest
    uint32_t found = 0;
    for (int64_t at = from; at < from + 4; at++) found = found << 8 | bytes[at < 0 ? at + count : at];
    return found;
  }
  static I load_words(const uint32_t* p) { return each_word([=](int i) { return p[i]; }); }
  static I codes(const uint8_t* s, const Words& w) {
    return each_word([&](int i) { uint32_t found = 0; std::memcpy(&found, s + w.from[i], 4); return found; });
  }
  static I shifted(I v, const int32_t* by, uint32_t mask) { return each_word([&](int i) { return v.at[i] >> by[i] & mask; }); }
  static F bytes_of_hash(I v) {
    return each([&](int i) {
      const uint32_t h = v.at[i] * kMultiplier + kAddend;
      return (float)((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24));
    });
  }
  static I all_words(uint32_t x) { return each_word([=](int) { return x; }); }
  // sums + the hash's byte sum times an integer, which `pair` has twice
  static I add_bytes_of_hash(I sums, I v, uint32_t pair) {
    const F bytes = bytes_of_hash(v);
    return each_word([&](int i) { return sums.at[i] + (uint32_t)bytes.at[i] * (uint32_t)(int32_t)(int16_t)pair; });
  }
  // 64 bytes of codes times their integers: lanes 4 b … 4 b + 3 have the sum of block b in four parts
  template <int Bits> static I dots(const uint8_t* codes, const int16_t* x) {
    I sums = all_words(0);
    for (int k = 0; k < 16 / Bits; k++)
      for (int i = 0; i < 32; i++) {
        uint16_t word;
        std::memcpy(&word, codes + 2 * i, 2);
        sums.at[i / 2] += (uint32_t)((word >> k * Bits & ((1 << Bits) - 1)) * x[32 * k + i]);
      }
    return sums;
  }
  static F fours(const float* x) { return each([=](int i) { return x[i / 4]; }); }
  static F number(I v) { return each([&](int i) { return (float)(int32_t)v.at[i]; }); }
  static F level(I v, const float* table) { return each([&](int i) { return table[v.at[i]]; }); }
  static F quarters(const int8_t* one, const int8_t* two) {
    return each([=](int i) { return (float)(i < 8 ? one[i] : two[i - 8]); });
  }
  static F bfloat16(const uint16_t* p) {
    return each([=](int i) { const uint32_t word = (uint32_t)p[i] << 16; float x; std::memcpy(&x, &word, 4); return x; });
  }
  static F halves(const uint16_t* p) { return each([=](int i) { return half(p[i]); }); }
  static float half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, rest = h & 1023;
    uint32_t word;
    if (exponent == 31) word = sign | 0x7f800000u | rest << 13;
    else if (exponent) word = sign | (exponent + 112) << 23 | rest << 13;
    else {
      const float small = (float)rest * (1.f / 16777216.f);
      std::memcpy(&word, &small, 4);
      word |= sign;
    }
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
};

inline float quarter(uint8_t q) {  // float8 e4m3, without infinities
  const int exponent = q >> 3 & 15, rest = q & 7;
  float x = exponent ? (8 + rest) * (1.f / 1024) : rest * (1.f / 512);  // 2^(exponent - 7) (1 + rest / 8), or 2^-6 rest / 8
  if (exponent) x *= (float)(1 << exponent);
  return q & 128 ? -x : x;
}

template <class S> float sum(typename S::F v) {
  float at[16];
  S::store(at, v);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) at[i] += at[i + step];
  return at[0];
}

template <class S> typename S::I sequence_words(const typename S::Source& source, const Words& w) {
  if (w.near) return S::words(source, w);
  uint32_t found[16];
  for (int i = 0; i < 16; i++) found[i] = Plain::word_at(source.bytes, w.from[i], source.count);
  return S::load_words(found);
}

// ------------------------------------------------------------------ a trellis backbone: rows in the lanes

inline int64_t band_bytes(const Part& part, int64_t across) { return part.stride ? part.stride : across * part.count; }

template <class S, int G, int C, bool Near>
QLR_APART void bands(const Part& part, const Layout& layout, const float* x, int64_t first, int64_t last, float* y) {
  using F = typename S::F;
  const int width = kSequence / part.height;
  const int64_t across = (part.cols + width - 1) / width;
  for (int64_t band = first; band < last; band++) {
    const uint8_t* s = part.codes + band * band_bytes(part, across);
    F sums[G];
    for (int g = 0; g < G; g++) sums[g] = S::zero();
    for (int64_t j = 0; j < across; j++, s += part.count) {
      const typename S::Source source = S::open(s, part.count);
      for (int q = 0; q < width / C; q++) {
        const float* own = x + j * width + q * C;
        F by[C];
        float middle = 0;
        for (int k = 0; k < C; k++) by[k] = S::all(own[k]), middle += own[k];
        const F taken = S::all(kMiddle * middle);  // as it comes: at the end, sums would have grown by what cancels
QLR_UNROLL
        for (int g = 0; g < G; g++) {
          const Words& w = layout.words[q * G + g];
          const typename S::I word = !Near ? sequence_words<S>(source, w) : g ? S::inner_words(source, w) : S::words(source, w);
          sums[g] = S::sub(sums[g], taken);
QLR_UNROLL
          for (int k = 0; k < C; k++)
            sums[g] = S::fma(S::bytes_of_hash(S::shifted(word, w.shift[k], layout.mask)), by[k], sums[g]);
        }
      }
    }
    for (int g = 0; g < G; g++) {
      float* own = y + (band - first) * part.height + 16 * g;
      S::store(own, S::mul(sums[g], S::all(part.gains[0])));
    }
  }
}

template <class S, int G>
void chunked(const Part& p, const Layout& l, const float* x, int64_t first, int64_t last, float* y) {
  auto* by = l.near ? (l.chunk == 4 ? bands<S, G, 4, true> : bands<S, G, 2, true>)
                    : (l.chunk == 4 ? bands<S, G, 4, false> : bands<S, G, 2, false>);
  by(p, l, x, first, last, y);
}

// ------------------------------------------------------------------ everything else: columns of one row in the lanes

// 16 values from `codes` on, in units of their group's scale.
template <class S, int K> inline typename S::F values(const Part& part, const Layout& layout, const uint8_t* codes) {
  if constexpr (K == kInteger || K == kLevels) {
    const Words& w = layout.words[0];
    const typename S::I found = S::shifted(S::codes(codes, w), w.shift[0], layout.mask);
    if constexpr (K == kInteger) return S::number(found);
    else return S::level(found, part.levels);
  } else if constexpr (K == kLattice) {
    auto point = [&](int at) { return part.points + 8 * (codes[at] | codes[at + 1] << 8); };
    const typename S::F found = S::mul(S::quarters(point(0), point(part.bits)), S::all(part.gains[0]));
    if (part.bits == 2) return found;
    auto second = [&](int at) { return part.bits == 3 ? part.roots + 8 * codes[at] : point(at); };
    return S::fma(S::quarters(second(2), second(part.bits + 2)), S::all(part.gains[1]), found);
  } else {
    return S::bfloat16((const uint16_t*)codes);
  }
}

// each(c, values − zero, scale) for every 16 columns of row r, and done(scale) at the end of every group.
template <class S, int K, class Each, class Done>
inline void through(const Part& part, const Layout& layout, int64_t r, Each each, Done done) {
  if constexpr (K == kTrellis) {
    const int width = kSequence / part.height, inside = (int)(r % part.height) * (width / 16);
    const int64_t across = (part.cols + width - 1) / width;
    const uint8_t* codes = part.codes + r / part.height * across * part.count;
    const typename S::F middle = S::all(kMiddle);
    for (int64_t j = 0; j < across; j++, codes += part.count) {
      const typename S::Source source = S::open(codes, part.count);
      for (int m = 0; m < width / 16; m++) {
        const Words& w = layout.words[inside + m];
        const typename S::F found = S::bytes_of_hash(S::shifted(sequence_words<S>(source, w), w.shift[0], layout.mask));
        each(j * width + 16 * m, S::sub(found, middle), part.gains[0]);
      }
    }
    done(part.gains[0]);
    return;
  }
  const uint8_t* codes = r < part.tail_row ? part.codes + r * part.count : part.tail + (r - part.tail_row) * part.count;
  const int64_t size = part.group ? part.group : part.cols, groups = (part.cols + size - 1) / size;
  const int step = K == kBfloat16 ? 32 : 2 * part.bits;  // bytes of 16 codes
  for (int64_t group = 0, at = r * groups, c = 0; group < groups; group++, at++) {
    const float scale = part.scales ? S::half(part.scales[at]) : part.small_scales ? quarter(part.small_scales[at]) : 1.f;
    const typename S::F zero = S::all(part.zeros ? part.zeros[at] : part.zero);
    for (const int64_t stop = c + size < part.cols ? c + size : part.cols; c < stop; c += 16, codes += step) {
      const typename S::F found = values<S, K>(part, layout, codes);
      each(c, K == kInteger ? S::sub(found, zero) : found, scale);
    }
    done(scale);
  }
}

template <class S, int K>
QLR_APART void multiply_rows(const Part& part, const Layout& layout, const float* x, int64_t first, int64_t last, float* y) {
  using F = typename S::F;
  for (int64_t r = first; r < last; r++) {
    F whole = S::zero(), own = S::zero();
    through<S, K>(
        part, layout, r, [&](int64_t c, F v, float) { own = S::fma(v, S::load(x + c), own); },
        [&](float scale) { whole = S::fma(own, S::all(scale), whole), own = S::zero(); });
    y[r - first] = sum<S>(whole);
  }
}

template <class S, int K> QLR_APART void add_rows(const Part& part, const Layout& layout, const float* z, float* y) {
  using F = typename S::F;
  for (int64_t r = 0; r < part.rows; r++)
    through<S, K>(
        part, layout, r, [&](int64_t c, F v, float scale) { S::store(y + c, S::fma(v, S::all(scale * z[r]), S::load(y + c))); },
        [](float) {});
}

template <class S, int K>
QLR_APART void decode_rows(const Part& part, const Layout& layout, int64_t first, int64_t last, float* out, int64_t stride) {
  for (int64_t r = first; r < last; r++) {
    float* row = out + (r - first) * stride;
    auto each = [&](int64_t c, typename S::F v, float scale) {
      const typename S::F found = S::mul(v, S::all(scale));
      if (c + 16 <= part.cols) return S::store(row + c, found);
      float at[16];
      S::store(at, found);
      for (int64_t i = c; i < part.cols; i++) row[i] = at[i - c];
    };
    through<S, K>(part, layout, r, each, [](float) {});
  }
}

template <int K> struct Constant { static constexpr int value = K; };

// what(kind), known to the compiler
template <class Do> void by_kind(int kind, Do what) {
  switch (kind) {
    case kTrellis: return what(Constant<kTrellis>{});
    case kInteger: return what(Constant<kInteger>{});
    case kLevels: return what(Constant<kLevels>{});
    case kLattice: return what(Constant<kLattice>{});
    default: return what(Constant<kBfloat16>{});
  }
}

template <class S> void multiply(const Part& part, const Layout& layout, const float* x, int64_t first, int64_t last, float* y) {
  if (part.kind == kTrellis && part.height >= 16) {
    first /= part.height, last = (last + part.height - 1) / part.height;
    if (part.height == 64) return chunked<S, 4>(part, layout, x, first, last, y);
    if (part.height == 32) return chunked<S, 2>(part, layout, x, first, last, y);
    return chunked<S, 1>(part, layout, x, first, last, y);
  }
  by_kind(part.kind, [&](auto k) { multiply_rows<S, decltype(k)::value>(part, layout, x, first, last, y); });
}

template <class S> void add(const Part& part, const Layout& layout, const float* z, float* y) {
  by_kind(part.kind, [&](auto k) { add_rows<S, decltype(k)::value>(part, layout, z, y); });
}

template <class S, int G, int C>
QLR_APART void decode_bands(const Part& part, const Layout& layout, int64_t first, int64_t last, float* out, int64_t stride) {
  constexpr int kColumns = 64, kStride = kColumns + 16;  // rows a power of two apart would lie in the same few lines of the cache
  const int width = kSequence / part.height;
  const int64_t across = (part.cols + width - 1) / width;
  alignas(64) float tile[16 * G * kStride];
  for (int64_t band = first / part.height; band * part.height < last; band++) {
    const uint8_t* s = part.codes + band * band_bytes(part, across);
    const int64_t row = band * part.height, rows = last - row < part.height ? last - row : part.height;
    for (int64_t start = 0; start < part.cols; start += kColumns) {
      const int64_t columns = part.cols - start < kColumns ? part.cols - start : kColumns;
      for (int64_t c = 0; c < columns; c += width, s += part.count) {
        const typename S::Source source = S::open(s, part.count);
        for (int q = 0; q < width / C; q++)
          for (int g = 0; g < G; g++) {
            const Words& w = layout.words[q * G + g];
            const typename S::I word = sequence_words<S>(source, w);
            typename S::F found[4];
            for (int k = 0; k < C; k++) {
              const typename S::F sums = S::bytes_of_hash(S::shifted(word, w.shift[k], layout.mask));
              found[k] = S::mul(S::sub(sums, S::all(kMiddle)), S::all(part.gains[0]));
            }
            float* own = tile + 16 * g * kStride + c + q * C;
            if (C == 4) {
              S::store_columns(own, kStride, found);
              continue;
            }
            for (int k = 0; k < C; k++) {
              float values[16];
              S::store(values, found[k]);
              for (int i = 0; i < 16; i++) own[i * kStride + k] = values[i];
            }
          }
      }
      for (int64_t r = 0; r < rows; r++)
        std::memcpy(out + (row + r - first) * stride + start, tile + r * kStride, sizeof(float) * columns);
    }
  }
}

template <class S> void decode(const Part& part, const Layout& layout, int64_t first, int64_t last, float* out, int64_t stride) {
  if (part.kind == kTrellis && part.height >= 16) {
    const bool four = layout.chunk == 4;
    auto* by = part.height == 64   ? (four ? decode_bands<S, 4, 4> : decode_bands<S, 4, 2>)
               : part.height == 32 ? (four ? decode_bands<S, 2, 4> : decode_bands<S, 2, 2>)
                                   : (four ? decode_bands<S, 1, 4> : decode_bands<S, 1, 2>);
    return by(part, layout, first, last, out, stride);
  }
  by_kind(part.kind, [&](auto k) { decode_rows<S, decltype(k)::value>(part, layout, first, last, out, stride); });
}

// ------------------------------------------------------------------ decoded rows times many tokens

// y[t * high + r] = Σ_c rows[r * stride + c] x[t * wide + c] for R rows and T tokens; c < stride, a multiple of 16.
template <class S, int R, int T>
inline void block(const float* rows, int64_t stride, const float* x, int64_t wide, float* y, int64_t high) {
  typename S::F sums[R][T], own[T];
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) sums[r][t] = S::zero();
  for (int64_t c = 0; c < stride; c += 16) {
QLR_UNROLL
    for (int t = 0; t < T; t++) own[t] = S::load(x + t * wide + c);
QLR_UNROLL
    for (int r = 0; r < R; r++) {
      const typename S::F row = S::load(rows + r * stride + c);
QLR_UNROLL
      for (int t = 0; t < T; t++) sums[r][t] = S::fma(row, own[t], sums[r][t]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) y[t * high + r] = sum<S>(sums[r][t]);
}

template <class S>
QLR_APART void dense(const float* rows, int64_t count, int64_t stride, const float* x, int64_t tokens, int64_t wide, float* y,
                     int64_t high) {
  constexpr int R = S::kRows, T = S::kTokens;
  for (int64_t t = 0; t < tokens;) {
    const bool whole = t + T <= tokens;
    const float* own = x + t * wide;
    float* out = y + t * high;
    int64_t r = 0;
    for (; whole && r + R <= count; r += R) block<S, R, T>(rows + r * stride, stride, own, wide, out + r, high);
    for (; r < count; r++)
      whole ? block<S, 1, T>(rows + r * stride, stride, own, wide, out + r, high)
            : block<S, 1, 1>(rows + r * stride, stride, own, wide, out + r, high);
    t += whole ? T : 1;
  }
}

// ------------------------------------------------------------------ rotations

// `room`: as many floats as a block has.
inline void rotate(float* x, int64_t size, int block, const float* hartley, float* room) {
  const int power = block & -block, odd = block / power;
  const float scale = 1.f / __builtin_sqrtf((float)power);
  for (float* own = x; own < x + size; own += block) {
    if (odd > 1) {
      for (int a = 0; a < power; a++) {
        float* out = room + (int64_t)a * odd;
        for (int j = 0; j < odd; j++) out[j] = 0;
        for (int i = 0; i < odd; i++) {
          const float by = own[(int64_t)a * odd + i];
          const float* row = hartley + i * odd;
          for (int j = 0; j < odd; j++) out[j] += by * row[j];
        }
      }
    } else {
      std::memcpy(room, own, sizeof(float) * block);
    }
    for (int64_t h = odd; h < block; h *= 2)
      for (int64_t s = 0; s < block; s += 2 * h)
        for (int64_t i = s; i < s + h; i++) {
          const float one = room[i], two = room[i + h];
          room[i] = one + two, room[i + h] = one - two;
        }
    for (int i = 0; i < block; i++) own[i] = room[i] * scale;
  }
}

}  // namespace
}  // namespace qlr
