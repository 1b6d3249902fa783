// 8 lanes, for arm64.
#include "search.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "viterbi.h"

namespace qlr {
namespace {
struct Neon {
  using Half = Neon;
  using V = uint16x8_t;
  static constexpr int W = 8;
  static int16x8_t s(V v) { return vreinterpretq_s16_u16(v); }
  static V u(int16x8_t v) { return vreinterpretq_u16_s16(v); }
  static V load(const void* p) { return vld1q_u16((const uint16_t*)p); }
  static void store(void* p, V v) { vst1q_u16((uint16_t*)p, v); }
  static V all(int x) { return vdupq_n_u16((uint16_t)x); }
  static V min(V a, V b) { return vminq_u16(a, b); }
  static V sub(V a, V b) { return vsubq_u16(a, b); }
  static V add_saturated(V a, V b) { return vqaddq_u16(a, b); }
  static V add_signed(V a, V b) { return u(vqaddq_s16(s(a), s(b))); }
  static V sub_signed(V a, V b) { return u(vqsubq_s16(s(a), s(b))); }
  static V square_high(V a) {
    const int32x4_t low = vmull_s16(vget_low_s16(s(a)), vget_low_s16(s(a))), high = vmull_high_s16(s(a), s(a));
    return vreinterpretq_u16_s16(vuzp2q_s16(vreinterpretq_s16_s32(low), vreinterpretq_s16_s32(high)));
  }
  static V where_less(V b, V a, V index, V old) { return vbslq_u16(vcltq_u16(b, a), index, old); }
  static void store_bytes(uint8_t* p, V v) { vst1_u8(p, vmovn_u16(v)); }
  static int least(V v) { return vminvq_u16(v); }
  template <int k> static V spread(const uint16_t* p) {
    alignas(16) static constexpr auto order = [] {
      struct { uint8_t at[16]; } o{};
      for (int i = 0; i < 8; i++) o.at[2 * i] = (uint8_t)(2 * (i >> k)), o.at[2 * i + 1] = (uint8_t)(2 * (i >> k) + 1);
      return o;
    }();
    return vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(p)), vld1q_u8(order.at)));
  }
};
}  // namespace

void search_neon(const Code& code, const float* x, int32_t end, int32_t* states, const Room& room) {
  search<Neon>(code, x, end, states, room);
}
}  // namespace qlr
#endif
