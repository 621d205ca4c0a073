// Products of rows with packed weights. Each sum runs through its inputs in one order whatever the number of rows.
#pragma once

#include <ATen/ATen.h>
#include <sys/mman.h>

#include <array>
#include <cstdlib>

#include "rows.h"
#include "threads.h"
#include "tiles.h"

namespace logprobs {

using at::Tensor;

constexpr int64_t kKept = 8 << 20;     // bytes that caches keep from a product until they are read
constexpr int64_t kInputs = 64;        // inputs that one float32 sum takes before it is added to the others
constexpr int kRows = kWide ? 12 : 6;  // rows that one read of a block serves: all registers hold sums
constexpr int64_t kNear = 2048;        // bytes ahead that memory is called for where nothing but reading takes time
constexpr int64_t kRowTile = kWide ? 192 : 384;  // rows that meet a block before the next: those of 512 bits stay in the
                                                 // second cache; on AVX2 fewer readings of weights are worth more

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Memory for std::free, in pages of 2 MiB where the system has them and it fills one: a pass reads all weights, and small
// pages make it wait.
inline void* allocate(int64_t bytes) {
  constexpr int64_t kPage = 2 << 20;
  const int64_t unit = bytes < kPage ? kCacheLine : kPage, whole = (std::max<int64_t>(bytes, 1) + unit - 1) / unit * unit;
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
  int64_t step;   // bytes of it while 128 of the block are read
  int64_t other;  // from there to what else is called for: the next line, or see `Later`

  template <int S>
  void call() {
    _mm_prefetch(from, _MM_HINT_T1);
    if constexpr (S == 2) _mm_prefetch(from + other, _MM_HINT_T1);
    from += step;
  }
};

// Memory that is read after a product, in pieces: piece p starts at base + p · stride. Groups of rows call for it too, where
// there are several, since they take longer than memory takes to give the weights, and as long as caches keep it. 32
// streams of 140 tokens, 4 MB a layer: attention 160 -> 118 us; 16 of 1,000, 13 MB, were 5 % slower with it.
struct Later {
  const char* base = nullptr;
  const int64_t* pieces = nullptr;
  int64_t count = 0, stride = 0, bytes = 0;

  // Has the group that is the `number`-th of `total` to read some lines of weights call for a part of a piece, if it is its
  // turn, instead of a second line of weights. It then calls for a line at a time, of weights too.
  void join(Ahead& ahead, int64_t number, int64_t total, int64_t lines) const {
    if (count > total || count * bytes > kKept) return;
    const int64_t most = lines * kCacheLine, whole = (bytes + most - 1) / most, parts = whole * count > total ? 1 : whole;
    const int64_t part = number * parts * count / total;
    if (part == (number + 1) * parts * count / total) return;
    ahead.other = base + pieces[part / parts] * stride + part % parts * most - ahead.from;
    ahead.step = kCacheLine;
  }
};

// R rows of x at an input, by two addresses and up to three distances, of which the processor makes the addresses of all.
// GCC, left to itself, keeps one for each row, for which there are too few registers.
template <int R, class T>
class Rows {
 public:
  Rows(const T* x, int64_t ldx)
      : low_(reinterpret_cast<const char*>(x)), high_(reinterpret_cast<const char*>(x + R / 2 * ldx)),
        one_(ldx * sizeof(T)), three_(3 * one_), five_(5 * one_) {
    asm("" : "+r"(one_), "+r"(three_), "+r"(five_));
  }

  // Row r, `ahead` inputs from here.
  const T* at(int r, int ahead = 0) const {
    const char* from = r < R / 2 ? low_ : high_;
    const int row = r < R / 2 ? r : r - R / 2;
    const int64_t down = row == 3 ? three_ : row == 5 ? five_ : row * one_;
    return reinterpret_cast<const T*>(from + down) + ahead;
  }

  // Row r's input `kAhead` from here, in all lanes.
  template <int kAhead>
  Floats spread_at(int r) const {
#ifdef __AVX512F__
    // GCC makes a distance of its own of each `down + kAhead`, for which there are too few registers again.
    const char* from = r < R / 2 ? low_ : high_;
    const int row = r < R / 2 ? r : r - R / 2;
    const int64_t down = row == 3 ? three_ : row == 5 ? five_ : one_;
    const auto& all = *reinterpret_cast<const std::array<char, 1 << 20>*>(from);  // what may be read
    constexpr int kOffset = kAhead * sizeof(T);
    Floats found;
    switch (row) {
      case 0: asm("vbroadcastss %c1(%2), %0" : "=v"(found) : "i"(kOffset), "r"(from), "m"(all)); break;
      case 2: asm("vbroadcastss %c1(%2, %3, 2), %0" : "=v"(found) : "i"(kOffset), "r"(from), "r"(down), "m"(all)); break;
      case 4: asm("vbroadcastss %c1(%2, %3, 4), %0" : "=v"(found) : "i"(kOffset), "r"(from), "r"(down), "m"(all)); break;
      default: asm("vbroadcastss %c1(%2, %3), %0" : "=v"(found) : "i"(kOffset), "r"(from), "r"(down), "m"(all));
    }
    return found;
#else
    return spread(*at(r, kAhead));
#endif
  }

  void advance(int inputs) {
    low_ += inputs * sizeof(T);
    high_ += inputs * sizeof(T);
    asm("" : "+r"(low_), "+r"(high_));
  }

 private:
  const char *low_, *high_;
  int64_t one_, three_, five_;
};

// What R rows come to with S vectors of 16 outputs, as registers.
template <int R, int S>
struct Sums {
  Floats at[R][S];

  void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s) at[r][s] = spread(0.0f);
  }

  // Adds the input `kAhead` from here of each row times weights.
  template <int kAhead>
  void add(const Rows<R, float>& x, const Floats (&weights)[S]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Floats input = x.template spread_at<kAhead>(r);
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) at[r][s] = add_products(at[r][s], input, weights[s]);
    }
  }

  // The same, of weights in lines of 32.
  template <int kAhead>
  void take(const Rows<R, float>& x, const float* weights) {
    Floats line[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) line[s] = load(weights + kAhead * kColumns + s * kLanes);
    add<kAhead>(x, line);
  }
};

// Adds the next `count` inputs of R rows of x times S vectors of 16 weights of each. Four at a time where what counts them
// competes with what multiplies.
template <int R, int S, class F>
inline Sums<R, S> add_inputs(Sums<R, S> sums, Rows<R, float>& x, const float* weights, int64_t count, F call) {
  const float* end = weights + count * kColumns;
  if constexpr (kWide)
    for (; weights + 3 * kColumns < end; weights += 4 * kColumns, x.advance(4)) {
      call();
      sums.template take<0>(x, weights);
      call();
      sums.template take<1>(x, weights);
      call();
      sums.template take<2>(x, weights);
      call();
      sums.template take<3>(x, weights);
    }
  for (; weights < end; weights += kColumns, x.advance(1)) {
    call();
    sums.template take<0>(x, weights);
  }
  return sums;
}

// out: R rows of x times S vectors of 16 weights of every input. A function by itself: in those that call it GCC keeps
// sums in memory. It takes no structure as a value: GCC copies those by loads wider than the stores that made them, which
// wait for all stores before (measured: 7 % of a scoring step).
template <int R, int S>
[[gnu::noinline]] void multiply(const float* from, int64_t ldx, const float* weights, int64_t in, const Ahead& soon,
                                Sums<R, S>& out) {
  Rows<R, float> x(from, ldx);
  Ahead ahead = soon;
  Sums<R, S> sums, none;
  sums.clear();
  none.clear();
  for (int64_t done = 0; done < in; done += kInputs) {
    const int64_t count = std::min(kInputs, in - done);
    const Sums<R, S> part = add_inputs(none, x, weights + done * kColumns, count, [&] { ahead.call<S>(); });
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < S; ++s) sums.at[r][s] = add(sums.at[r][s], part.at[r][s]);
  }
  out = sums;
}

// As above, of weights in pairs of inputs.
template <int R, int S>
[[gnu::noinline]] void multiply(const Input<BFloat16>* from, int64_t ldx, const BFloat16* weights, int64_t in,
                                const Ahead& soon, Sums<R, S>& out) {
  Rows<R, Input<BFloat16>> x(from, ldx);
  Ahead ahead = soon;
  Sums<R, S> sums;
  sums.clear();
  const int32_t *pairs = reinterpret_cast<const int32_t*>(weights), *end = pairs + in / 2 * kColumns;
  for (; pairs < end; pairs += kColumns, x.advance(2)) {
    ahead.call<S>();
#ifdef __AVX512BF16__
    Wholes line[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) line[s] = load(pairs + s * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x.at(r), sizeof pair);
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s)
        sums.at[r][s] = _mm512_dpbf16_ps(sums.at[r][s], (__m512bh)line[s], (__m512bh)spread(pair));
    }
#else
    Floats line[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) line[s] = as_floats(left_by(load(pairs + s * kLanes), 16));
    sums.template add<0>(x, line);
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) line[s] = as_floats(bits_and(load(pairs + s * kLanes), spread(-0x10000)));
    sums.template add<1>(x, line);
#endif
  }
  out = sums;
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

#ifndef __AVX512F__
// Lines of weights as float32: those that are, where they are, others in `room`.
inline const float* widened(const float* lines, int64_t, float*) { return lines; }
inline const float* widened(const BFloat16* lines, int64_t in, float* room) {
  for (int64_t i = 0; i < in; i += 2)
    for (int64_t column = 0; column < kColumns; column += kLanes) {
      const Wholes pairs = load(reinterpret_cast<const int32_t*>(lines + i * kColumns) + column);
      store(room + i * kColumns + column, as_floats(left_by(pairs, 16)));
      store(room + (i + 1) * kColumns + column, as_floats(bits_and(pairs, spread(-0x10000))));
    }
  return room;
}

// emit(row, left, right) of `rows` rows with one block of weights, to the same bits as `multiply`. All rows meet some of
// the weights, which then are in the first cache, before they meet the next.
template <class T, class F>
void multiply_many(const float* x, int64_t rows, int64_t ldx, const T* weights, int64_t in, const char* soon, F emit) {
  alignas(64) float sums[kRowTile * kColumns], room[kInputs * kColumns];
  std::fill_n(sums, rows * kColumns, 0.0f);
  const int64_t groups = (rows + kRows - 1) / kRows;
  const int64_t share = kInputs * kColumns * static_cast<int64_t>(sizeof(T)) / groups + 64;
  for (int64_t from = 0; from < in; from += kInputs) {
    const int64_t count = std::min(kInputs, in - from);
    const float* lines = widened(weights + from * kColumns, count, room);
    each_group<kRows>(rows, [&](auto group, int64_t row) {
      constexpr int R = group.value;
      for (const char* end = soon + share; soon < end; soon += kCacheLine) _mm_prefetch(soon, _MM_HINT_T1);
      for (int64_t column = 0; column < kColumns; column += kLanes) {
        float* to = sums + row * kColumns + column;
        Rows<R, float> input(x + row * ldx + from, ldx);
        Sums<R, 1> before, found;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) before.at[r][0] = std::is_same_v<T, float> ? spread(0.0f) : load(to + r * kColumns);
        found = add_inputs(before, input, lines + column, count, [] {});
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          if constexpr (std::is_same_v<T, float>) found.at[r][0] = add(load(to + r * kColumns), found.at[r][0]);
          store(to + r * kColumns, found.at[r][0]);
        }
      }
    });
  }
  for (int64_t row = 0; row < rows; ++row)
    emit(row, load(sums + row * kColumns), load(sums + row * kColumns + kLanes));
}
#endif

// emit(row, block, left, right) for every row of x and every block of outputs: 16 + 16 sums with the bias added; before
// that emit.expect(row, block), if it has that. Called by every member of the team.
template <class T, class F>
void product(Team& team, const Inputs<Input<T>>& x, int64_t rows, const Packed<T>& by, F emit, const Later& later = {}) {
  const bool tiled = std::is_same_v<T, BFloat16> && on_tiles();
  const int64_t most = tiled ? kTallRowTile : kRowTile, unit = tiled ? kTileRows : kRows;
  const int64_t blocks = blocks_of(by.outputs), least = (rows + most - 1) / most;
  const int64_t height = ((rows + least - 1) / least + unit - 1) / unit * unit, tiles = (rows + height - 1) / height;
  const int64_t width = std::max<int64_t>(1, blocks / (16 * team.size())), shares = (blocks + width - 1) / width;
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
        product_on_tiles(x.from(top), count, by.weights, begin, end,
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
#ifndef __AVX512F__
      if (count > 2 * kRows) {
        multiply_many(x.at(top, 0), count, x.width, by.weights + block * by.in * kColumns, by.in, soon,
                      [&](int64_t row, Floats left, Floats right) { with_bias(top + row, block, left, right); });
        continue;
      }
#endif
      const int64_t groups = (count + kRows - 1) / kRows;
      int64_t number = block * groups;
      each_group<kRows>(count, [&](auto group, int64_t row) {
        constexpr int R = group.value, S = kVectors<R>;
        if constexpr (requires { emit.expect(row, block); })
          for (int64_t r = row; r < row + R; ++r) emit.expect(top + r, block);
        constexpr int64_t kPassed = S * kLanes * (std::is_same_v<T, float> ? 1 : 2);  // weights of an input, or of two
        const int64_t step = 2 * kLanes * sizeof(float) / (groups * 2 / S), share = by.in * step * sizeof(T) / 4;
        Sums<R, S> sums[2 / S];
#pragma GCC unroll 2
        for (int pass = 0; pass < 2 / S; ++pass, soon += share) {
          Ahead ahead{soon, step, kCacheLine};
          if (S == 2 && groups > 1) later.join(ahead, number++, blocks * groups, by.in * kColumns / kPassed);
          multiply(x.at(top + row, 0), x.width, by.weights + block * by.in * kColumns + pass * kPassed, by.in, ahead,
                   sums[pass]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) with_bias(top + row + r, block, sums[0].at[r][0], sums[2 / S - 1].at[r][S - 1]);
      });
    }
  });
}

}  // namespace logprobs
