// 16 lanes of AVX2; included inside a target that has it.
#pragma once

#include "viterbi.h"

namespace qlr {
namespace {

struct Avx2 {
  using Half = Avx2;
  using V = __m256i;
  static constexpr int W = 16;
  static V load(const void* p) { return _mm256_loadu_si256((const V*)p); }
  static void store(void* p, V v) { _mm256_storeu_si256((V*)p, v); }
  static V all(int x) { return _mm256_set1_epi16((short)x); }
  static V min(V a, V b) { return _mm256_min_epu16(a, b); }
  static V sub(V a, V b) { return _mm256_sub_epi16(a, b); }
  static V add_saturated(V a, V b) { return _mm256_adds_epu16(a, b); }
  static V add_signed(V a, V b) { return _mm256_adds_epi16(a, b); }
  static V sub_signed(V a, V b) { return _mm256_subs_epi16(a, b); }
  static V square_high(V a) { return _mm256_mulhi_epi16(a, a); }
  static V where_less(V b, V a, V index, V old) {
    return _mm256_blendv_epi8(index, old, _mm256_cmpeq_epi16(_mm256_min_epu16(a, b), a));
  }
  static void store_bytes(uint8_t* p, V v) {
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
  }
  static int least(V v) {
    __m128i m = _mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return _mm_extract_epi16(_mm_minpos_epu16(m), 0);
  }
  template <int k> static V spread(const uint16_t* p) {
    alignas(32) static constexpr auto order = [] {
      struct { uint8_t at[32]; } o{};
      for (int i = 0; i < 16; i++) o.at[2 * i] = (uint8_t)(2 * (i >> k)), o.at[2 * i + 1] = (uint8_t)(2 * (i >> k) + 1);
      return o;
    }();
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)), load(order.at));
  }
};

}  // namespace
}  // namespace qlr
