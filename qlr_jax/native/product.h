// Products with packed matrices for a CPU: what their parts share. Stored arrays are those of a folder (formats/qlr/packed.py).
#pragma once

#include <cstdint>
#include <functional>

namespace qlr {

enum Kind : int32_t { kNone, kTrellis, kInteger, kLevels, kLattice, kBfloat16 };
enum Type : int32_t { kFloat32, kBfloat16Type, kFloat16 };

// Q (out, in), Lᵀ (rank, out) or R (rank, in) as it is stored. Whoever calls owns what is pointed to.
struct Part {
  int32_t kind;
  int32_t bits;        // of a code; of a trellis, of a state
  int32_t group;       // weights of a row that share a scale; 0: all of it, or there is no scale
  int32_t height;      // rows of a trellis sequence
  int64_t rows, cols;
  int64_t count;       // bytes of a trellis sequence, or of a row
  const uint8_t* codes;
  const uint16_t* scales;       // float16 (rows, groups), or null
  const uint8_t* small_scales;  // the same as float8 e4m3, or null
  const uint8_t* zeros;         // (rows, groups), or null; of a trellis, rates of segments in sixteenths (segments.h), or null
  const float* levels;          // the 16 levels that a code is the index of; 16 also where there are fewer bits
  const int8_t* points;         // eight numbers, in quarters, a point of the lattice
  const int8_t* roots;          // the same of the second stage at 3 bits
  float gains[2];               // of the trellis, or of both stages of the lattice
  float zero;                   // of integers without zeros
  int64_t stride;  // bytes from a row of trellis sequences to the next, where others lie between; else 0. Set by `segments.h`.
  // Rows from `tail_row` on, with room behind them: vectors read a little further than the last row goes. Set by `product.cpp`.
  const uint8_t* tail;
  int64_t tail_row;
};

// y = W x, W = scale · Uᵀ (Q + L diag(s) R) V, or diag(row_scales) Q V.
struct Layer {
  int64_t outputs, inputs;
  int32_t rank, seed;
  int32_t turned_inputs, turned_outputs;  // whether V, and U, are rotations
  int32_t input_block, output_block;      // of the rotation
  Part backbone, left, right;
  const uint16_t* component_scale;  // float16 (rank,), or null
  const float* scale;               // of one number, or null
  const uint16_t* row_scales;       // float16 (outputs,), or null
  const uint16_t *input_signs, *output_signs;  // float16, where they were trained; null: those of the seed
};

constexpr int kSequence = 256;  // weights of a trellis sequence

// How each of 16 lanes gets the four bytes that its code or state lies in.
struct Words {
  bool near;         // four neighbouring lanes find theirs in 16 bytes; else `from` is followed lane by lane
  bool wraps;        // some lanes begin before the sequence does, where its end comes before it
  bool shared;       // all lanes find theirs in the same 16 bytes
  int32_t from[16];  // the first of a lane's bytes
  int32_t base[4];   // of the 16 bytes of each four lanes; -4 where they wrap
  int32_t far_base;  // of the 64 bytes of all; -1 where they wrap, and the sequence is longer
  alignas(64) uint8_t order[4][16];
  alignas(64) uint8_t far_order[64];
  alignas(64) int32_t shift[4][16];  // for each of the weights that the bytes serve
};

// What depends on a part's sizes only.
struct Layout {
  int chunk;  // weights of a lane that its four bytes serve
  bool near;  // all of its words are
  uint32_t mask;
  Words words[16];
};

constexpr int kBlock = 64;  // columns of a trellis whose activations share a step
constexpr int kAhead = 64;  // blocks of integers whose scales are made ready together

// Activations of one token, rounded to 16 bits in blocks of columns (product_rounded.h).
struct Rounded {
  const float* steps;      // of each block, and room for a multiple of kAhead; x ≈ step · the integer
  const uint32_t* pairs;   // of a trellis: each column's integer twice
  const uint32_t* starts;  // −510 times the sum of a block's integers
  const int16_t* values;   // of integers: in the order in which `dots` meets them
  const float* sums;       // of a block's integers, in four parts as its lanes take them
};

// The routines of one instruction set. Each gives what the portable ones give, to the bit.
struct Routines {
  const char* name;
  // y[r - first] = Σ_c part[r, c] x[c] for rows first … last − 1 (multiples of `Part::height`); x has zeros beyond the columns
  void (*multiply)(const Part&, const Layout&, const float* x, int64_t first, int64_t last, float* y);
  // the same with rounded activations; for parts that `block_of` (product.cpp) gives a block
  void (*multiply_rounded)(const Part&, const Layout&, const Rounded& x, int64_t first, int64_t last, float* y);
  // y[c] += Σ_r z[r] part[r, c] for all columns
  void (*add)(const Part&, const Layout&, const float* z, float* y);
  // the rows of a part: out[r − first][c], with `stride` floats a row
  void (*decode)(const Part&, const Layout&, int64_t first, int64_t last, float* out, int64_t stride);
  // y[t * high + r] = Σ_c rows[r * stride + c] x[t * wide + c] for all rows and tokens; c < stride, a multiple of 16
  void (*dense)(const float* rows, int64_t count, int64_t stride, const float* x, int64_t tokens, int64_t wide, float* y, int64_t high);
  // x in blocks of 2^k · odd: Walsh-Hadamard ⊗ Hartley, in place
  void (*rotate)(float* x, int64_t size, int block, const float* hartley, float* room);
};

const Routines* routines_of(const char* name);  // null where this machine or build has none of it
const Routines* widest_routines();

extern const Routines portable_routines, avx2_routines, avx512_routines, neon_routines;

// Runs a task on the caller's thread and, at any time or never, on so many others less one; a task that has begun may outlast it.
using Team = std::function<void(const std::function<void()>& task, int threads)>;

// x (tokens, inputs) -> y (tokens, outputs), both of `type`; null, or what is needed in place of what was given. Unless `exact`,
// activations of few tokens are rounded to 16 bits where that is faster.
const char* multiply_layer(const Routines&, const Layer&, const void* x, int64_t tokens, int type, bool exact, void* y,
                           int threads, const Team& team);

// The rows of a part: float32 (last - first, cols); `first` is a multiple of its height.
const char* decode_part(const Routines&, const Part&, int64_t first, int64_t last, float* out, int threads, const Team& team);

}  // namespace qlr
