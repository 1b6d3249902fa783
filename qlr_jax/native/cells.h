// A trellis backbone whose rate changes inside the matrix (core/quantizers/segmented.py): cells, each an ordinary part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "product.h"

namespace qlr {

constexpr int64_t kSegments = 8;             // of rows, and of columns, at most
constexpr int kLeastRate = 16, kMostRate = 96;  // sixteenths of a bit

// Rows and columns of a part, from (row, col) on.
struct Cell {
  Part part;
  int64_t row, col;
};

// The cells of some rows, side by side.
struct Strip {
  int64_t first, last;  // rows
  std::vector<Cell> cells;
};

inline bool has_cells(const Part& part) { return part.kind == kTrellis && part.zeros; }

inline float gain_of_rate(int rate) {  // of the code, as core/quantizers/trellis.py has it
  const double bits = rate / 16.0;
  const double gain = 1.0 + 0.1 * std::min(std::max(bits - 2.0, 0.0), 1.0) + 0.075 * std::min(std::max(bits - 4.0, 0.0), 2.0);
  return (float)gain / 147.8f;
}

// The strips of a part, from the first row on; one of one cell where it has no cells. Empty: rates that no such part has.
inline std::vector<Strip> strips_of(const Part& part) {
  if (!has_cells(part)) return {{0, part.rows, {{part, 0, 0}}}};
  const int64_t width = kSequence / part.height, across = (part.cols + width - 1) / width;
  const int64_t down = (part.rows + part.height - 1) / part.height;
  const int64_t tall = std::min(kSegments, down), wide = std::min(kSegments, across);
  std::vector<Strip> strips;
  const uint8_t *codes = part.codes, *rate = part.zeros, *end = codes + down * across * part.count;
  for (int64_t i = 0; i < tall; i++) {
    const int64_t top = i * down / tall, bottom = (i + 1) * down / tall;
    Strip strip = {top * part.height, std::min(bottom * part.height, part.rows), {}};
    int64_t stride = 0;
    for (int64_t j = 0; j < wide; j++, rate++) {
      const int64_t left = j * across / wide, right = (j + 1) * across / wide;
      if (*rate < kLeastRate || *rate > kMostRate) return {};
      Cell cell = {part, strip.first, left * width};
      cell.part.zeros = nullptr, cell.part.count = 2 * *rate, cell.part.gains[0] = gain_of_rate(*rate);
      cell.part.rows = strip.last - strip.first, cell.part.cols = std::min(right * width, part.cols) - cell.col;
      cell.part.codes = codes + stride;
      stride += (right - left) * cell.part.count;
      strip.cells.push_back(cell);
    }
    for (Cell& cell : strip.cells) cell.part.stride = stride;
    codes += (bottom - top) * stride;
    strips.push_back(strip);
  }
  return codes > end ? std::vector<Strip>{} : strips;
}

}  // namespace qlr
