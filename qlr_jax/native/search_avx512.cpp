// 32 lanes, for x86-64 with AVX-512BW.
#include "search.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512vl")
#endif
#include "avx2.h"

namespace qlr {
namespace {
struct Avx512 {
  using Half = Avx2;
  using V = __m512i;
  static constexpr int W = 32;
  static V load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, V v) { _mm512_storeu_si512(p, v); }
  static V all(int x) { return _mm512_set1_epi16((short)x); }
  static V min(V a, V b) { return _mm512_min_epu16(a, b); }
  static V sub(V a, V b) { return _mm512_sub_epi16(a, b); }
  static V add_saturated(V a, V b) { return _mm512_adds_epu16(a, b); }
  static V add_signed(V a, V b) { return _mm512_adds_epi16(a, b); }
  static V sub_signed(V a, V b) { return _mm512_subs_epi16(a, b); }
  static V square_high(V a) { return _mm512_mulhi_epi16(a, a); }
  static V where_less(V b, V a, V index, V old) { return _mm512_mask_mov_epi16(old, _mm512_cmplt_epu16_mask(b, a), index); }
  static void store_bytes(uint8_t* p, V v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi16_epi8(v)); }
  static int least(V v) {
    __m256i h = _mm256_min_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    __m128i m = _mm_min_epu16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    return _mm_extract_epi16(_mm_minpos_epu16(m), 0);
  }
  template <int k> static V spread(const uint16_t* p) {
    alignas(64) static constexpr auto order = [] {
      struct { uint16_t at[32]; } o{};
      for (int i = 0; i < 32; i++) o.at[i] = (uint16_t)(i >> k);
      return o;
    }();
    return _mm512_permutexvar_epi16(load(order.at), _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)));
  }
};
}  // namespace

void search_avx512(const Code& code, const float* x, int32_t end, int32_t* states, const Room& room) {
  search<Avx512>(code, x, end, states, room);
}
}  // namespace qlr
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
