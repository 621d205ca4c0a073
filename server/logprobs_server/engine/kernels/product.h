// Products of rows with packed weights. Each sum runs through its inputs in one order whatever the number of rows.
#pragma once

#include <ATen/ATen.h>
#include <sys/mman.h>

#include <cstdlib>

#include "rows.h"
#include "threads.h"
#include "tiles.h"

namespace logprobs {

using at::Tensor;

constexpr int64_t kInputs = 64;    // inputs that one float32 sum takes before it is added to the others
constexpr int kRows = kWide ? 12 : 6;  // rows that one read of a block serves: all registers hold sums
constexpr int64_t kNear = 2048;    // bytes ahead that memory is called for where nothing but reading takes time
constexpr int64_t kRowTile = 192;  // rows whose inputs stay in the second cache while blocks pass

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Memory for std::free, in pages of 2 MiB where the system has them and it fills one: a pass reads all weights, and small
// pages make it wait.
inline void* allocate(int64_t bytes) {
  constexpr int64_t kPage = 2 << 20;
  const int64_t unit = bytes < kPage ? 64 : kPage, whole = (std::max<int64_t>(bytes, 1) + unit - 1) / unit * unit;
  void* memory = std::aligned_alloc(unit, whole);
  TORCH_CHECK(memory != nullptr, "no memory for ", whole, " bytes");
  if (unit == kPage) madvise(memory, whole, MADV_HUGEPAGE);
  return memory;
}

inline Tensor huge(at::IntArrayRef shape, at::ScalarType type) {
  void* memory = allocate(c10::multiply_integers(shape) * c10::elementSize(type));
  return at::from_blob(memory, shape, [](void* pointer) { std::free(pointer); }, at::TensorOptions().dtype(type));
}

// Blocks of 32 outputs.
inline int64_t blocks_of(int64_t outputs) { return (outputs + kColumns - 1) / kColumns; }

// Weights [out, in] as blocks of 32 outputs: [blocks][in][32], bfloat16 in pairs of inputs, [blocks][in / 2][32][2].
// Put into `packed`, which has blocks · in · 32 elements.
inline void pack(const Tensor& weight, const Tensor& packed) {
  const int64_t out = weight.size(0), in = weight.size(1), blocks = blocks_of(out);
  const int64_t pair = weight.scalar_type() == at::kFloat ? 1 : 2;
  TORCH_CHECK(in % pair == 0, "an odd number of inputs in bfloat16");
  const Tensor padded = at::constant_pad_nd(weight, {0, 0, 0, blocks * kColumns - out});
  packed.view({blocks, in / pair, kColumns, pair}).copy_(padded.view({blocks, kColumns, in / pair, pair}).permute({0, 2, 1, 3}));
}

template <class T>
struct Packed {
  const T* weights;
  const float* bias;  // [outputs], or none
  int64_t outputs, in;
};

// What rows are multiplied with weights of type T as: bfloat16 where the processor multiplies that.
#ifdef __AVX512BF16__
template <class T>
using Input = T;
#else
template <class T>
using Input = float;
#endif

// Vectors of 16 that R rows are multiplied with at once: both of a block of 32, where registers have room for the sums.
template <int R>
constexpr int kVectors = kWide || R <= 2 ? 2 : 1;

// What a group of rows calls for while it reads a block: its share of the block that comes next, so that memory is
// read all the time, not only by the first group. One or two rows read as fast as memory gives; the block's own next
// lines then come sooner (measured with one row: 57 GB/s, not 47).
struct Ahead {
  const char* from;
  int64_t passes;  // over a block

  // The block's lines at `offset` bytes are being read, in S vectors.
  template <int S>
  void call(int64_t offset) const {
    const char* line = from + offset / passes;
    _mm_prefetch(line, _MM_HINT_T1);
    if constexpr (S == 2) _mm_prefetch(line + 64, _MM_HINT_T1);
  }
};

// sums[R][S] of R rows of x with S vectors of 16 weights of every input.
template <int R, int S>
inline void multiply(const float* x, int64_t ldx, const float* weights, int64_t in, const Ahead& ahead,
                     Floats (&sums)[R][S]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) sums[r][s] = spread(0.0f);
  for (int64_t from = 0; from < in; from += kInputs) {
    const int64_t to = std::min(in, from + kInputs);
    Floats part[R][S];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s) part[r][s] = spread(0.0f);
    for (int64_t i = from; i < to; ++i) {
      ahead.call<S>(i * kColumns * sizeof(float));
      Floats line[S];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) line[s] = load(weights + i * kColumns + s * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats input = spread(x[r * ldx + i]);
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) part[r][s] = fmadd(input, line[s], part[r][s]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s) sums[r][s] = add(sums[r][s], part[r][s]);
  }
}

// As above, of weights in pairs of inputs.
template <int R, int S>
inline void multiply(const Input<BFloat16>* x, int64_t ldx, const BFloat16* weights, int64_t in, const Ahead& ahead,
                     Floats (&sums)[R][S]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) sums[r][s] = spread(0.0f);
  for (int64_t i = 0; i < in; i += 2) {
    const int32_t* pairs = reinterpret_cast<const int32_t*>(weights + i * kColumns);
    ahead.call<S>(i * kColumns * sizeof(BFloat16));
#ifdef __AVX512BF16__
    Wholes line[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) line[s] = load(pairs + s * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * ldx + i, sizeof pair);
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s)
        sums[r][s] = _mm512_dpbf16_ps(sums[r][s], (__m512bh)line[s], (__m512bh)spread(pair));
    }
#else
#pragma GCC unroll 2
    for (int which = 0; which < 2; ++which) {
      Floats line[S];
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) {
        const Wholes both = load(pairs + s * kLanes);
        line[s] = as_floats(which == 0 ? left_by(both, 16) : bits_and(both, spread(-0x10000)));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Floats input = spread(x[r * ldx + i + which]);
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) sums[r][s] = fmadd(input, line[s], sums[r][s]);
      }
    }
#endif
  }
}

// f(integral_constant R, first row) for rows in groups of nearly equal size, at most kMost each.
template <int kMost, class F>
inline void each_group(int64_t rows, F f) {
  const int64_t groups = (rows + kMost - 1) / kMost;
  for (int64_t g = 0, row = 0; g < groups; ++g) {
    const int64_t count = (rows - row + groups - g - 1) / (groups - g);
    [&]<int... I>(std::integer_sequence<int, I...>) {
      ((count == I + 1 && (f(std::integral_constant<int, I + 1>{}, row), true)) || ...);
    }(std::make_integer_sequence<int, kMost>{});
    row += count;
  }
}

// emit(row, block, left, right) for every row of x[rows, in] and every block of outputs: 16 + 16 sums with the bias
// added. Leading dimension of x: ldx. Called by every member of the team.
template <class T, class F>
void product(Team& team, const Input<T>* x, int64_t rows, int64_t ldx, const Packed<T>& by, F emit) {
  const bool tiled = std::is_same_v<T, BFloat16> && on_tiles();
  const int64_t most = tiled ? kTallRowTile : kRowTile, unit = tiled ? kTileRows : 1;
  const int64_t blocks = blocks_of(by.outputs), least = (rows + most - 1) / most;
  const int64_t height = ((rows + least - 1) / least + unit - 1) / unit * unit, tiles = (rows + height - 1) / height;
  const int64_t width = std::max<int64_t>(1, blocks / (8 * team.size())), shares = (blocks + width - 1) / width;
  const auto with_bias = [&](int64_t row, int64_t block, Floats left, Floats right) {
    if (by.bias != nullptr) {
      const int64_t column = block * kColumns, rest = by.outputs - column;
      left = add(left, load(by.bias + column, first_lanes(rest)));
      right = add(right, load(by.bias + column + kLanes, first_lanes(rest - kLanes)));
    }
    emit(row, block, left, right);
  };
  team.each(tiles * shares, [&](int64_t task) {
    const int64_t top = task / shares * height, count = std::min(height, rows - top);
    const int64_t begin = task % shares * width, end = std::min(blocks, begin + width);
#ifdef LOGPROBS_TILES
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (tiled) {
        product_on_tiles(x + top * ldx, count, ldx, by.weights, by.in, begin, end,
                         [&](int64_t row, int64_t block, Floats left, Floats right) {
                           with_bias(top + row, block, left, right);
                         });
        return;
      }
    }
#endif
    for (int64_t block = begin; block < end; ++block) {
      const auto at = [&](int64_t b) { return reinterpret_cast<const char*>(by.weights + b * by.in * kColumns); };
      const char* soon = count > 2 ? at(block + 1) : at(block) + kNear;  // see `Ahead`
      const int64_t groups = (count + kRows - 1) / kRows;
      each_group<kRows>(count, [&](auto group, int64_t row) {
        constexpr int R = group.value, S = kVectors<R>;
        constexpr int64_t kWidth = S * kLanes * (std::is_same_v<T, float> ? 1 : 2);  // weights of an input, or of two
        const int64_t passes = groups * 2 / S, share = by.in * kColumns * sizeof(T) / passes;
        Floats sums[2 / S][R][S];
#pragma GCC unroll 2
        for (int pass = 0; pass < 2 / S; ++pass, soon += share)
          multiply(x + (top + row) * ldx, ldx, by.weights + block * by.in * kColumns + pass * kWidth, by.in,
                   Ahead{soon, passes}, sums[pass]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) with_bias(top + row + r, block, sums[0][r][0], sums[2 / S - 1][r][S - 1]);
      });
    }
  });
}

}  // namespace logprobs
