// 16 lanes in four registers, for arm64.
#include "product.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "product_rounded.h"

namespace qlr {
namespace {
struct NeonLanes {
  static constexpr int kRows = 2, kTokens = 3;
  struct F { float32x4_t at[4]; };
  struct I { uint32x4_t at[4]; };
  using Source = Plain::Source;
  static Source open(const uint8_t* bytes, int64_t count) { return {bytes, count}; }
  template <class M> static F each(M make) { return {make(0), make(1), make(2), make(3)}; }
  template <class M> static I each_word(M make) { return {make(0), make(1), make(2), make(3)}; }
  static F zero() { return all(0.f); }
  static F all(float x) { return each([=](int) { return vdupq_n_f32(x); }); }
  static F load(const float* p) { return each([=](int q) { return vld1q_f32(p + 4 * q); }); }
  static void store(float* p, F v) { for (int q = 0; q < 4; q++) vst1q_f32(p + 4 * q, v.at[q]); }
  static void store_columns(float* p, int64_t stride, const F* v) {
    for (int q = 0; q < 4; q++) {
      const float32x4x2_t ab = vtrnq_f32(v[0].at[q], v[1].at[q]), cd = vtrnq_f32(v[2].at[q], v[3].at[q]);
      const float32x4_t rows[4] = {vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0])),
                                   vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1])),
                                   vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0])),
                                   vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]))};
      for (int i = 0; i < 4; i++) vst1q_f32(p + (4 * q + i) * stride, rows[i]);
    }
  }
  static F sub(F a, F b) { return each([&](int q) { return vsubq_f32(a.at[q], b.at[q]); }); }
  static F mul(F a, F b) { return each([&](int q) { return vmulq_f32(a.at[q], b.at[q]); }); }
  static F fma(F a, F b, F c) { return each([&](int q) { return vfmaq_f32(c.at[q], a.at[q], b.at[q]); }); }
  static uint32x4_t ordered(uint8x16_t bytes, const Words& w, int q) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vld1q_u8(w.order[q])));
  }
  static I words(const Source& s, const Words& w) {
    if (!w.wraps) return codes(s.bytes, w);
    const uint8x16_t first = vextq_u8(vld1q_u8(s.bytes + s.count - 16), vld1q_u8(s.bytes), 12);
    return each_word([&](int q) { return ordered(w.base[q] < 0 ? first : vld1q_u8(s.bytes + w.base[q]), w, q); });
  }
  static I inner_words(const Source& s, const Words& w) { return codes(s.bytes, w); }
  static I codes(const uint8_t* p, const Words& w) {
    return each_word([&](int q) { return ordered(vld1q_u8(p + w.base[q]), w, q); });
  }
  static I load_words(const uint32_t* p) { return each_word([=](int q) { return vld1q_u32(p + 4 * q); }); }
  static I shifted(I v, const int32_t* by, uint32_t mask) {
    return each_word([&](int q) { return vandq_u32(vshlq_u32(v.at[q], vnegq_s32(vld1q_s32(by + 4 * q))), vdupq_n_u32(mask)); });
  }
  static uint32x4_t bytes_summed(uint32x4_t v) {
    const uint32x4_t h = vmlaq_u32(vdupq_n_u32(kAddend), v, vdupq_n_u32(kMultiplier));
    return vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_u32(h)));
  }
  static F bytes_of_hash(I v) { return each([&](int q) { return vcvtq_f32_u32(bytes_summed(v.at[q])); }); }
  static I all_words(uint32_t x) { return each_word([=](int) { return vdupq_n_u32(x); }); }
  static I add_bytes_of_hash(I sums, I v, uint32_t pair) {
    const uint32x4_t by = vdupq_n_u32((uint32_t)(int32_t)(int16_t)pair);
    return each_word([&](int q) { return vmlaq_u32(sums.at[q], bytes_summed(v.at[q]), by); });
  }
  template <int Bits> static I dots(const uint8_t* codes, const int16_t* x) {
    return each_word([&](int q) {
      const uint16x8_t words = vreinterpretq_u16_u8(vld1q_u8(codes + 16 * q));
      int32x4_t sums = vdupq_n_s32(0);
QLR_UNROLL
      for (int k = 0; k < 16 / Bits; k++) {
        const uint16x8_t moved = vshlq_u16(words, vdupq_n_s16((int16_t)(-k * Bits)));
        const int16x8_t found = vreinterpretq_s16_u16(vandq_u16(moved, vdupq_n_u16((1 << Bits) - 1)));
        const int16x8_t own = vld1q_s16(x + 32 * k + 8 * q);
        sums = vaddq_s32(sums, vpaddq_s32(vmull_s16(vget_low_s16(found), vget_low_s16(own)), vmull_high_s16(found, own)));
      }
      return vreinterpretq_u32_s32(sums);
    });
  }
  static F fours(const float* x) { return each([=](int q) { return vdupq_n_f32(x[q]); }); }
  static F halves(const uint16_t* p) {
    return each([=](int q) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * q))); });
  }
  static float half(uint16_t h) { return Plain::half(h); }
  static F number(I v) { return each([&](int q) { return vcvtq_f32_s32(vreinterpretq_s32_u32(v.at[q])); }); }
  static F level(I v, const float* table) {
    const uint8_t* bytes = (const uint8_t*)table;
    const uint8x16x4_t levels = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    return each([&](int q) {
      const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100u), v.at[q], vdupq_n_u32(0x04040404u));
      return vreinterpretq_f32_u8(vqtbl4q_u8(levels, vreinterpretq_u8_u32(at)));
    });
  }
  static F quarters(const int8_t* one, const int8_t* two) {
    const int16x8_t a = vmovl_s8(vld1_s8(one)), b = vmovl_s8(vld1_s8(two));
    auto wide = [](int16x4_t x) { return vcvtq_f32_s32(vmovl_s16(x)); };
    return {wide(vget_low_s16(a)), wide(vget_high_s16(a)), wide(vget_low_s16(b)), wide(vget_high_s16(b))};
  }
  static F bfloat16(const uint16_t* p) {
    return each([=](int q) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * q), 16)); });
  }
};
}  // namespace

const Routines neon_routines = routines<NeonLanes>("neon");
}  // namespace qlr
#endif
