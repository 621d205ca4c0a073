// Products on AMX tiles: 8 tiles of 16 rows, which multiply 32 inputs of 16 rows with 16 outputs at a time. Where a
// processor has them, all bfloat16 products run on them, whatever the number of rows. Sums take the inputs in their order.
#pragma once

#include <ATen/cpu/Utils.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "rows.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define LOGPROBS_TILES
#endif

namespace logprobs {

constexpr int64_t kSide = 16;          // rows of a tile, and outputs
constexpr int64_t kTileInputs = 32;    // inputs of a row in a tile
constexpr int64_t kTileRows = 32;      // rows that go through tiles together
constexpr int64_t kTallRowTile = 288;  // as kRowTile; reading the weights once more would take longer than products do
constexpr int64_t kFarther = 4096;     // as kNear, of few rows

inline bool on_tiles() {
#ifdef LOGPROBS_TILES
  static const bool supported = at::cpu::init_amx();  // asks the system for leave
  return supported;
#else
  return false;
#endif
}

// What products take: [rows][width], or, if `tiled`, [rows / 16][width / 32][16][32], a tile's rows one behind the other: to
// load them from that many places makes products of many rows take an eighth longer.
template <class T>
struct Inputs {
  T* base;
  int64_t width;
  bool tiled = false;

  // Row `row` from input i on, up to the next multiple of 16.
  T* at(int64_t row, int64_t i) const {
    if (!tiled) return base + row * width + i;
    return base + row / kSide * (kSide * width) + i / kTileInputs * (kSide * kTileInputs) + row % kSide * kTileInputs +
           i % kTileInputs;
  }

  // From row `row` on, which is the first of a tile.
  Inputs from(int64_t row) const { return {base + row * width, width, tiled}; }
};

#ifdef LOGPROBS_TILES
// Shapes the tiles of this thread, which clears them: sums in 0 to 3, up to 32 rows of x in 4 and 5, weights in 6 and 7.
inline void shape_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  const int64_t upper = std::min(rows, kSide), lower = rows - upper;
  for (int tile = 0; tile < 8; ++tile) {
    const bool low = tile == 2 || tile == 3 || tile == 5;
    shape.rows[tile] = tile >= 6 ? kSide : low ? lower : upper;
    shape.bytes[tile] = shape.rows[tile] > 0 ? 64 : 0;
  }
  asm volatile("" ::"r"(&shape) : "memory");  // the instruction is not known to read all of it
  _tile_loadconfig(&shape);
}

// Adds 32 inputs of rows, from `upper` and `lower` on, `apart` from each other, times weights' lines to the sums. Rows are
// not to push the weights out of the first cache.
template <bool kBoth>
inline void tile_step(const BFloat16* upper, const BFloat16* lower, int64_t apart, const BFloat16* lines) {
  constexpr int64_t kLine = 2 * kColumns;
  _tile_loadd(6, lines, kLine * sizeof(BFloat16));
  _tile_stream_loadd(4, upper, apart * sizeof(BFloat16));
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, lines + kColumns, kLine * sizeof(BFloat16));
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kBoth) {
    _tile_stream_loadd(5, lower, apart * sizeof(BFloat16));
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// sums[rows][32] = the first rows of x · weights of one block; calls between() with every 32 inputs, as vectors and tiles
// work at the same time.
template <bool kBoth, class F>
inline void multiply_tiles(const Inputs<BFloat16>& x, int64_t rows, const BFloat16* weights, float* sums, F between) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kBoth) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t in = x.width, even = in / kTileInputs * kTileInputs;
  const int64_t apart = x.tiled ? kTileInputs : in, step = x.tiled ? kSide * kTileInputs : kTileInputs;
  const BFloat16 *upper = x.base, *lower = x.base + kSide * in;
  for (int64_t i = 0; i < even; i += kTileInputs, upper += step, lower += step) {
    tile_step<kBoth>(upper, lower, apart, weights + i * kColumns);
    between();
  }
  if (even < in) {  // the rest, with zeros behind it
    alignas(64) BFloat16 inputs[kTileRows * kTileInputs] = {}, lines[kTileInputs * kColumns] = {};
    for (int64_t r = 0; r < rows; ++r) std::copy_n(x.at(r, even), in - even, inputs + r * kTileInputs);
    std::copy_n(weights + even * kColumns, (in - even) * kColumns, lines);
    asm volatile("" ::: "memory");  // the tiles' loads are not known to read them
    tile_step<kBoth>(inputs, inputs + kSide * kTileInputs, kTileInputs, lines);
  }
  constexpr int64_t kBytes = kColumns * sizeof(float);
  _tile_stored(0, sums, kBytes);
  _tile_stored(1, sums + kSide, kBytes);
  if constexpr (kBoth) {
    _tile_stored(2, sums + kSide * kColumns, kBytes);
    _tile_stored(3, sums + kSide * kColumns + kSide, kBytes);
  }
}

// emit(row, block, left, right) for rows of x with blocks begin … end - 1; sums of one group of rows are emitted while
// the next is multiplied.
template <class F>
void product_on_tiles(const Inputs<BFloat16>& x, int64_t rows, const BFloat16* weights, int64_t begin, int64_t end,
                      F emit) {
  alignas(64) float sums[2][kTileRows * kColumns];
  int64_t row = 0, block = 0, told = 0, count = 0;  // what waits to be emitted
  const float* waiting = nullptr;
  const auto tell = [&](int64_t most) {
    for (const int64_t to = std::min(count, told + most); told < to; ++told)
      emit(row + told, block, load(waiting + told * kColumns), load(waiting + told * kColumns + kLanes));
  };
  const int64_t in = x.width, groups = (rows + kTileRows - 1) / kTileRows, ahead = (kTileRows + groups - 1) / groups;
  const int64_t each = (kTileRows * kTileInputs + in - 1) / in;  // told with every 32 inputs
  int64_t shaped = 0;
  asm volatile("" ::: "memory");  // x has been written by now
  for (int64_t b = begin, turn = 0; b < end; ++b) {
    const BFloat16* lines = weights + b * in * kColumns;
    const char* soon = reinterpret_cast<const char*>(lines) + (groups > 1 ? in * kColumns * sizeof(BFloat16) : kFarther);
    for (int64_t first = 0; first < rows; first += kTileRows, turn ^= 1) {
      const int64_t now = std::min(kTileRows, rows - first);
      if (now != shaped) shape_tiles(shaped = now);
      const auto between = [&] {
        for (int64_t line = 0; line < ahead; ++line, soon += kCacheLine) _mm_prefetch(soon, _MM_HINT_T1);
        tell(each);
      };
      if (now > kSide)
        multiply_tiles<true>(x.from(first), now, lines, sums[turn], between);
      else
        multiply_tiles<false>(x.from(first), now, lines, sums[turn], between);
      tell(kTileRows);
      row = first, block = b, told = 0, count = now, waiting = sums[turn];
    }
  }
  tell(kTileRows);
  _tile_release();
}
#endif

}  // namespace logprobs
