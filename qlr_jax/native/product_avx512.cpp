// 16 lanes in one register, for x86-64 with AVX-512 VBMI and VNNI.
#include "product.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni")
#endif
#include "product_avx2.h"

namespace qlr {
namespace {
struct Avx512Lanes {
  static constexpr int kRows = 4, kTokens = 5;
  using F = __m512;
  using I = __m512i;
  struct Source { const uint8_t* bytes; int64_t count; __m512i all; };  // `all`: where it has at most 64 bytes
  static Source open(const uint8_t* bytes, int64_t count) {
    return {bytes, count, count > 64 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(~0ull >> (64 - count), bytes)};
  }
  static F zero() { return _mm512_setzero_ps(); }
  static F all(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store_columns(float* p, int64_t stride, const F* v) {
    Avx2Lanes::F halves[4];
    for (int k = 0; k < 4; k++) halves[k] = {_mm512_castps512_ps256(v[k]), _mm512_extractf32x8_ps(v[k], 1)};
    Avx2Lanes::store_columns(p, stride, halves);
  }
  static F sub(F x, F y) { return _mm512_sub_ps(x, y); }
  static F mul(F x, F y) { return _mm512_mul_ps(x, y); }
  static F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
  static I joined(Avx2Lanes::I v) { return _mm512_inserti64x4(_mm512_castsi256_si512(v.a), v.b, 1); }
  static I words(const Source& s, const Words& w) {
    if (s.count <= 64) return _mm512_permutexvar_epi8(_mm512_load_si512(w.far_order), s.all);
    if (w.far_base < 0) return joined(Avx2Lanes::words({s.bytes, s.count}, w));
    return _mm512_permutexvar_epi8(_mm512_load_si512(w.far_order), _mm512_loadu_si512(s.bytes + w.far_base));
  }
  static I inner_words(const Source& s, const Words& w) { return words(s, w); }
  static I codes(const uint8_t* p, const Words& w) {
    if (w.shared)
      return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(Avx2Lanes::bytes(p + w.base[0])), _mm512_load_si512(w.order));
    return joined(Avx2Lanes::codes(p, w));
  }
  static I load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static I shifted(I v, const int32_t* by, uint32_t mask) {
    return _mm512_and_si512(_mm512_srlv_epi32(v, _mm512_load_si512(by)), _mm512_set1_epi32((int)mask));
  }
  static I hash(I v) {
    return _mm512_add_epi32(_mm512_mullo_epi32(v, _mm512_set1_epi32((int)kMultiplier)), _mm512_set1_epi32((int)kAddend));
  }
  static F bytes_of_hash(I v) {
    return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), hash(v), _mm512_set1_epi8(1)));
  }
  static I all_words(uint32_t x) { return _mm512_set1_epi32((int)x); }
  static I add_bytes_of_hash(I sums, I v, uint32_t pair) {
    return _mm512_dpwssd_epi32(sums, _mm512_maddubs_epi16(hash(v), _mm512_set1_epi8(1)), _mm512_set1_epi32((int)pair));
  }
  template <int Bits> static I dots(const uint8_t* codes, const int16_t* x) {
    const __m512i words = _mm512_loadu_si512(codes), mask = _mm512_set1_epi16((1 << Bits) - 1);
    I sums = _mm512_setzero_si512();
QLR_UNROLL
    for (int k = 0; k < 16 / Bits; k++)
      sums = _mm512_dpwssd_epi32(sums, _mm512_and_si512(_mm512_srli_epi16(words, k * Bits), mask), _mm512_loadu_si512(x + 32 * k));
    return sums;
  }
  static F fours(const float* x) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 _mm512_broadcast_f32x4(_mm_loadu_ps(x)));
  }
  static F halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static float half(uint16_t h) { return _cvtsh_ss(h); }
  static F number(I v) { return _mm512_cvtepi32_ps(v); }
  static F level(I v, const float* table) { return _mm512_permutexvar_ps(v, _mm512_loadu_ps(table)); }
  static F quarters(const int8_t* one, const int8_t* other) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
        _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)one), _mm_loadl_epi64((const __m128i*)other))));
  }
  static F bfloat16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
};
}  // namespace

const Routines avx512_routines = routines<Avx512Lanes>("avx512");
}  // namespace qlr
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
