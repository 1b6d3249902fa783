// Products with activations that are rounded to 16 bits: sums of integers, of which an instruction takes several at once.
//
//   x_c ≈ step_b X_c,  |X_c| ≤ 32767,  step_b = max over the block b of |x_c| / 32767
//   trellis   Σ_c w_c x_c = gain Σ_b step_b Σ_{c in b} (bytes_c − 510) X_c
//   integers  Σ_c w_c x_c = Σ_b scale step_b (Σ_{c in b} code_c X_c − zero Σ_{c in b} X_c)
//
// A block of a trellis is kBlock columns; of integers it is what 128 bits of codes serve, four blocks to a step of 16 lanes.
// Rounding adds an error of about 2e-5 of the product, 1/100 of what rounding it to bfloat16 does.
#pragma once

#include "product_kernels.h"

namespace qlr {
namespace {

template <class S, int G, int C, bool Near>
QLR_APART void rounded_bands(const Part& part, const Layout& layout, const Rounded& x, int64_t first, int64_t last, float* y) {
  using F = typename S::F;
  using I = typename S::I;
  const int width = kSequence / part.height, inside = kBlock / width;
  const int64_t across = (part.cols + width - 1) / width;
  for (int64_t band = first; band < last; band++) {
    const uint8_t* s = part.codes + band * band_bytes(part, across);
    F sums[G];
    for (int g = 0; g < G; g++) sums[g] = S::zero();
    const uint32_t* own = x.pairs;
    for (int64_t j = 0, block = 0; j < across; block++) {
      I found[G];
      for (int g = 0; g < G; g++) found[g] = S::all_words(x.starts[block]);
      for (const int64_t stop = j + inside < across ? j + inside : across; j < stop; j++, s += part.count) {
        const typename S::Source source = S::open(s, part.count);
        for (int q = 0; q < width / C; q++, own += C) {
QLR_UNROLL
          for (int g = 0; g < G; g++) {
            const Words& w = layout.words[q * G + g];
            const I word = !Near ? sequence_words<S>(source, w) : g ? S::inner_words(source, w) : S::words(source, w);
QLR_UNROLL
            for (int k = 0; k < C; k++) found[g] = S::add_bytes_of_hash(found[g], S::shifted(word, w.shift[k], layout.mask), own[k]);
          }
        }
      }
      for (int g = 0; g < G; g++) sums[g] = S::fma(S::number(found[g]), S::all(x.steps[block]), sums[g]);
    }
    for (int g = 0; g < G; g++) S::store(y + (band - first) * part.height + 16 * g, S::mul(sums[g], S::all(part.gains[0])));
  }
}

// The scales of groups `at` … `at` + count − 1 of all, and the zeros times −1.
template <class S> inline void groups_of(const Part& part, int64_t at, int count, int64_t all, float* scales, float* zeros) {
  for (int i = 0; i < count; i += 16) {
    if (part.scales && at + i + 16 <= all) S::store(scales + i, S::halves(part.scales + at + i));
    else
      for (int k = i; k < i + 16 && at + k < all; k++) scales[k] = part.scales ? S::half(part.scales[at + k]) : 1.f;
  }
  if (part.zeros)
    for (int i = 0; i < count; i++) zeros[i] = -(float)part.zeros[at + i];
  else
    for (int i = 0; i < count; i++) zeros[i] = -part.zero;
}

// scales[i] = scale · step and zeros[i] = −zero · scale · step of blocks `first` … `first` + ahead − 1 of a row, of which those
// that there are count; ahead a multiple of 16. Each: blocks that share a scale, 0 where it is another number.
template <class S, int Each> inline void scales_of(const Part& part, const float* steps, int64_t row, int64_t first, int ahead,
                                                   int64_t columns, float* __restrict scales, float* __restrict zeros) {
  const int64_t groups = part.group ? (part.cols + part.group - 1) / part.group : 1, all = part.rows * groups;
  const int64_t each = Each ? Each : part.group ? part.group / columns : INT64_MAX / 2;
  float own_scales[kAhead + 16] = {}, own_zeros[kAhead + 16] = {};
  const int64_t group = first / each, there = (first + ahead - 1) / each - group + 1;
  groups_of<S>(part, row * groups + group, (int)(there < groups - group ? there : groups - group), all, own_scales, own_zeros);
  if constexpr (Each != 0) {
    for (int g = 0; g < ahead / Each; g++)
      for (int k = 0; k < Each; k++) scales[g * Each + k] = own_scales[g], zeros[g * Each + k] = own_zeros[g];
  } else if ((group + 1) * each - first >= ahead) {
    for (int i = 0; i < ahead; i++) scales[i] = own_scales[0], zeros[i] = own_zeros[0];
  } else {
    int64_t end = (group + 1) * each - first;
    for (int g = 0, i = 0; i < ahead; g++, end += each)
      for (; i < ahead && i < end; i++) scales[i] = own_scales[g], zeros[i] = own_zeros[g];
  }
  for (int i = 0; i < ahead; i++) scales[i] *= steps[first + i], zeros[i] *= scales[i];
}

template <class S, int Bits>
QLR_APART void rounded_rows(const Part& part, const Rounded& x, int64_t first, int64_t last, float* y) {
  using F = typename S::F;
  constexpr int kColumns = 128 / Bits;  // of a block
  const int64_t each = part.group / kColumns;
  auto* ready = each == 1 ? scales_of<S, 1> : each == 2 ? scales_of<S, 2> : each == 4 ? scales_of<S, 4> : scales_of<S, 0>;
  const int64_t blocks = (part.cols + 4 * kColumns - 1) / (4 * kColumns) * 4;
  alignas(64) float scales[kAhead], zeros[kAhead];
  for (int64_t r = first; r < last; r++) {
    const uint8_t* codes = r < part.tail_row ? part.codes + r * part.count : part.tail + (r - part.tail_row) * part.count;
    F whole = S::zero();
    for (int64_t start = 0; start < blocks; start += kAhead) {
      const int count = (int)(blocks - start < kAhead ? blocks - start : kAhead);
      ready(part, x.steps, r, start, (count + 15) / 16 * 16, kColumns, scales, zeros);
      for (int i = 0; i < count; i += 4, codes += 64) {
        const F found = S::number(S::template dots<Bits>(codes, x.values + (start + i) * kColumns));
        whole = S::fma(found, S::fours(scales + i), whole);
        whole = S::fma(S::load(x.sums + 4 * (start + i)), S::fours(zeros + i), whole);
      }
    }
    y[r - first] = sum<S>(whole);
  }
}

template <class S>
void multiply_rounded(const Part& part, const Layout& layout, const Rounded& x, int64_t first, int64_t last, float* y) {
  if (part.kind == kTrellis) {
    first /= part.height, last = (last + part.height - 1) / part.height;
    auto with = [&](auto groups) {
      constexpr int G = decltype(groups)::value;
      auto* by = layout.near ? (layout.chunk == 4 ? rounded_bands<S, G, 4, true> : rounded_bands<S, G, 2, true>)
                             : (layout.chunk == 4 ? rounded_bands<S, G, 4, false> : rounded_bands<S, G, 2, false>);
      by(part, layout, x, first, last, y);
    };
    if (part.height == 64) return with(Constant<4>{});
    if (part.height == 32) return with(Constant<2>{});
    return with(Constant<1>{});
  }
  auto* by = part.bits == 1 ? rounded_rows<S, 1>
             : part.bits == 2 ? rounded_rows<S, 2>
             : part.bits == 4 ? rounded_rows<S, 4>
                              : rounded_rows<S, 8>;
  by(part, x, first, last, y);
}

template <class S> constexpr Routines routines(const char* name) {
  return {name, multiply<S>, multiply_rounded<S>, add<S>, decode<S>, dense<S>, rotate};
}

}  // namespace
}  // namespace qlr
