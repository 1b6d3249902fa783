// 16 lanes of AVX2, in two registers; included inside a target that has it.
#pragma once

#include "product_rounded.h"

namespace qlr {
namespace {

struct Avx2Lanes {
  static constexpr int kRows = 2, kTokens = 3;
  struct F { __m256 a, b; };
  struct I { __m256i a, b; };
  struct Source { const uint8_t* bytes; int64_t count; };
  static Source open(const uint8_t* bytes, int64_t count) { return {bytes, count}; }
  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
  static void store_eight(float* p, int64_t stride, __m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 ab = _mm256_unpacklo_ps(a, b), cd = _mm256_unpacklo_ps(c, d);
    const __m256 ab_high = _mm256_unpackhi_ps(a, b), cd_high = _mm256_unpackhi_ps(c, d);
    const __m256 rows[4] = {_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE),
                            _mm256_shuffle_ps(ab_high, cd_high, 0x44), _mm256_shuffle_ps(ab_high, cd_high, 0xEE)};
    for (int i = 0; i < 4; i++) {  // rows i and i + 4
      _mm_storeu_ps(p + i * stride, _mm256_castps256_ps128(rows[i]));
      _mm_storeu_ps(p + (i + 4) * stride, _mm256_extractf128_ps(rows[i], 1));
    }
  }
  static void store_columns(float* p, int64_t stride, const F* v) {
    store_eight(p, stride, v[0].a, v[1].a, v[2].a, v[3].a), store_eight(p + 8 * stride, stride, v[0].b, v[1].b, v[2].b, v[3].b);
  }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static __m128i bytes(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
  static __m128i first(const Source& s) {  // the end of the sequence before its beginning
    return _mm_alignr_epi8(bytes(s.bytes), bytes(s.bytes + s.count - 16), 12);
  }
  static __m256i two(__m128i one, __m128i other) { return _mm256_inserti128_si256(_mm256_castsi128_si256(one), other, 1); }
  static I ordered(__m256i a, __m256i b, const Words& w) {
    return {_mm256_shuffle_epi8(a, _mm256_load_si256((const __m256i*)w.order[0])),
            _mm256_shuffle_epi8(b, _mm256_load_si256((const __m256i*)w.order[2]))};
  }
  static I words(const Source& s, const Words& w) {
    if (!w.wraps) return codes(s.bytes, w);
    const __m128i before = first(s);
    auto four = [&](int q) { return w.base[q] < 0 ? before : bytes(s.bytes + w.base[q]); };
    return ordered(two(four(0), four(1)), two(four(2), four(3)), w);
  }
  static I inner_words(const Source& s, const Words& w) { return separate(s.bytes, w); }
  static I separate(const uint8_t* p, const Words& w) {
    return ordered(two(bytes(p + w.base[0]), bytes(p + w.base[1])), two(bytes(p + w.base[2]), bytes(p + w.base[3])), w);
  }
  static I codes(const uint8_t* p, const Words& w) {
    if (w.shared) {
      const __m256i all = _mm256_broadcastsi128_si256(bytes(p + w.base[0]));
      return ordered(all, all, w);
    }
    return separate(p, w);
  }
  static I load_words(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}; }
  static I shifted(I v, const int32_t* by, uint32_t mask) {
    const __m256i m = _mm256_set1_epi32((int)mask);
    return {_mm256_and_si256(_mm256_srlv_epi32(v.a, _mm256_load_si256((const __m256i*)by)), m),
            _mm256_and_si256(_mm256_srlv_epi32(v.b, _mm256_load_si256((const __m256i*)(by + 8))), m)};
  }
  static __m256i hash(__m256i v) {
    return _mm256_add_epi32(_mm256_mullo_epi32(v, _mm256_set1_epi32((int)kMultiplier)), _mm256_set1_epi32((int)kAddend));
  }
  static __m256 hashed(__m256i v) {
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(hash(v), _mm256_set1_epi8(1)), _mm256_set1_epi16(1)));
  }
  static F bytes_of_hash(I v) { return {hashed(v.a), hashed(v.b)}; }
  static I all_words(uint32_t x) { return {_mm256_set1_epi32((int)x), _mm256_set1_epi32((int)x)}; }
  static I add_bytes_of_hash(I sums, I v, uint32_t pair) {
    const __m256i by = _mm256_set1_epi32((int)pair), one = _mm256_set1_epi8(1);
    return {_mm256_add_epi32(sums.a, _mm256_madd_epi16(_mm256_maddubs_epi16(hash(v.a), one), by)),
            _mm256_add_epi32(sums.b, _mm256_madd_epi16(_mm256_maddubs_epi16(hash(v.b), one), by))};
  }
  template <int Bits> static __m256i half_dots(const uint8_t* codes, const int16_t* x) {
    const __m256i words = _mm256_loadu_si256((const __m256i*)codes), mask = _mm256_set1_epi16((1 << Bits) - 1);
    __m256i sums = _mm256_setzero_si256();
QLR_UNROLL
    for (int k = 0; k < 16 / Bits; k++) {
      const __m256i found = _mm256_and_si256(_mm256_srli_epi16(words, k * Bits), mask);
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(found, _mm256_loadu_si256((const __m256i*)(x + 32 * k))));
    }
    return sums;
  }
  template <int Bits> static I dots(const uint8_t* codes, const int16_t* x) {
    return {half_dots<Bits>(codes, x), half_dots<Bits>(codes + 32, x + 16)};
  }
  static F fours(const float* x) {
    const __m256 all = _mm256_broadcast_ps((const __m128*)x);
    return {_mm256_permutevar_ps(all, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
            _mm256_permutevar_ps(all, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
  }
  static F number(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static __m256 looked_up(__m256i v, const float* table) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), v), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), v);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(v, 28)));
  }
  static F level(I v, const float* table) { return {looked_up(v.a, table), looked_up(v.b, table)}; }
  static __m256 eight(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
  static F quarters(const int8_t* one, const int8_t* other) { return {eight(one), eight(other)}; }
  static __m256 wide(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static F bfloat16(const uint16_t* p) { return {wide(p), wide(p + 8)}; }
  static __m256 eight_halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static F halves(const uint16_t* p) { return {eight_halves(p), eight_halves(p + 8)}; }
  static float half(uint16_t h) { return _cvtsh_ss(h); }
};

}  // namespace
}  // namespace qlr
