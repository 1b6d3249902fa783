// A trellis backbone whose rate changes along its columns (core/quantizers/segmented.py): segments, each an ordinary part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "product.h"

namespace qlr {

constexpr int64_t kSegments = 8;                // at most
constexpr int kLeastRate = 16, kMostRate = 96;  // sixteenths of a bit

// All rows of a part and some of its columns, from `col` on.
struct Segment {
  Part part;
  int64_t col;
};

inline bool has_segments(const Part& part) { return part.kind == kTrellis && part.zeros; }

inline float gain_of_rate(int rate) {  // of the code, as core/quantizers/trellis.py has it
  const double bits = rate / 16.0;
  const double gain = 1.0 + 0.1 * std::min(std::max(bits - 2.0, 0.0), 1.0) + 0.075 * std::min(std::max(bits - 4.0, 0.0), 2.0);
  return (float)gain / 147.8f;
}

// The segments of a part, one of all columns where it has none. Empty: rates that no such part has.
inline std::vector<Segment> segments_of(const Part& part) {
  if (!has_segments(part)) return {{part, 0}};
  const int64_t width = kSequence / part.height, across = (part.cols + width - 1) / width;
  const int64_t count = std::min(kSegments, across), stride = across * part.count;
  std::vector<Segment> segments;
  int64_t start = 0;
  for (int64_t j = 0; j < count; j++) {
    const int64_t left = j * across / count, right = (j + 1) * across / count, rate = part.zeros[j];
    if (rate < kLeastRate || rate > kMostRate) return {};
    Segment segment = {part, left * width};
    segment.part.zeros = nullptr, segment.part.count = 2 * rate, segment.part.gains[0] = gain_of_rate(rate);
    segment.part.cols = std::min(right * width, part.cols) - segment.col;
    segment.part.codes = part.codes + start, segment.part.stride = stride;
    start += (right - left) * segment.part.count;
    segments.push_back(segment);
  }
  return start > stride ? std::vector<Segment>{} : segments;
}

}  // namespace qlr
