// Attention over keys and values in blocks. A query goes through its keys block by block, first to last, whatever is
// computed beside it, and each sum runs in one order: its bits depend on its position and what precedes it alone.
#pragma once

#include <bit>
#include <vector>

#include "product.h"

namespace logprobs {

constexpr int64_t kBlock = 32;  // tokens in a block of the KV cache; BLOCK_SIZE in kv_cache.py
constexpr uint32_t kAll = ~uint32_t{0};
constexpr int64_t kLines = 48;  // queries of heads that go through the same keys together
constexpr int64_t kSoon = 4;    // queries that are called for before they are read
constexpr int kDirect = 4;      // queries that wait for memory: they call for the next block while they read one

// Memory of one thread, kept from call to call: fresh pages cost more than what is computed in them.
class Arena {
 public:
  float* floats(int64_t count) {
    if (count > capacity_) {
      capacity_ = count;
      floats_.reset(static_cast<float*>(allocate(count * sizeof(float))));
    }
    return floats_.get();
  }

 private:
  struct Free {
    void operator()(float* floats) const { std::free(floats); }
  };
  std::unique_ptr<float, Free> floats_;
  int64_t capacity_ = 0;
};

// What the rows of a step are: row r stands at positions[r]; chunk c is rows first[c] … first[c + 1] - 1 of one
// sequence, whose blocks are tables[c].
struct Step {
  int64_t rows;
  const int64_t* positions;
  int64_t chunks;
  const int64_t* first;
  const int64_t* tables;
  int64_t table_width;

  int64_t block(int64_t chunk, int64_t position) const { return tables[chunk * table_width + position / kBlock]; }
};

struct Heads {
  int64_t query, key, size;  // heads that ask, heads that hold keys and values, their dimension
  int64_t width() const { return (query + 2 * key) * size; }
  int64_t group() const { return query / key; }
};

// What keys and values are kept as and multiplied with queries and weights, 4 bytes each.
//   float of a float32 model.
//   Pair of a bfloat16 one: two neighbours in whole numbers of 12 or 13 bits and a sign, under one scale for a token's
//   key or value. As small as bfloat16 and finer than float16, and their products run twice as fast as float32's. Sums
//   of whole numbers are exact: kKeyLimit · kLimit · 64 and kLimit · kLimit · 32 stay below 2^31.
using Pair = int32_t;
constexpr float kLimit = 8191.0f, kKeyLimit = 4095.0f;

template <class C>
constexpr int64_t kWidth = std::is_same_v<C, Pair> ? 2 : 1;  // numbers in a cell

template <class C>
constexpr int64_t kCells = std::is_same_v<C, Pair> ? 32 : 1 << 20;  // cells of a key that one sum can take

// Cells of a key of `size` numbers.
template <class C>
int64_t cells_of(int64_t size) {
  return (size + kWidth<C> - 1) / kWidth<C>;
}

// What one head keeps of a block.
template <class C>
struct Block {
  C* keys;            // [cells][kBlock]
  C* values;          // [kBlock / width][size]
  float* key_scales;  // [kBlock], of pairs alone
  float* value_scales;
};

// One layer's part of the cache, [blocks][layers][heads][`Block`].
template <class C>
struct Kept {
  C* base;
  int64_t layers, layer;

  static constexpr int64_t kScales = std::is_same_v<C, Pair> ? kBlock : 0;
  static int64_t keys(const Heads& heads) { return cells_of<C>(heads.size) * kBlock; }
  static int64_t values(const Heads& heads) { return kBlock / kWidth<C> * heads.size; }
  static int64_t stride(const Heads& heads) { return keys(heads) + values(heads) + 2 * kScales; }

  Block<C> at(const Heads& heads, int64_t block, int64_t head) const {
    C* start = base + ((block * layers + layer) * heads.key + head) * stride(heads);
    float* scales = reinterpret_cast<float*>(start + keys(heads) + values(heads));
    return {start, start + keys(heads), scales, scales + kScales};
  }
};

struct Look {
  const float* query_norm;  // of each head, or none
  const float* key_norm;
  float eps;
  const float* rotation;  // [positions][rotary], cosines in the first half
  int64_t rotary;
  int64_t window;       // keys that a query sees, itself included; 0: all before it
  const float* slopes;  // ALiBi, per query head, or none
  float scale;
};

// The scale under which `size` numbers become whole numbers up to `limit`: 0 if they count as 0; NaN or infinite if one
// of them is, so that whatever it touches becomes NaN.
inline float scale_of(const float* x, int64_t size, float limit) {
  Wholes largest = spread(0);  // compared as bits, which puts NaN above all
  each_vector(size, [&](int64_t i, Mask lanes) {
    largest = unsigned_max(largest, as_wholes(magnitude(load(x + i, lanes))));
  });
  const float found = std::bit_cast<float>(unsigned_largest(largest));
  return found < 1e-30f ? 0.0f : found / limit;
}

// x over the scale, rounded to whole numbers.
inline Wholes whole(Floats x, float scale) {
  return nearest(mul(x, spread(scale == 0.0f ? 0.0f : 1.0f / scale)));
}

// emit(cell, Pair) of x[size] under a scale, an odd last one with 0.
template <class F>
void each_pair(const float* x, int64_t size, float scale, F emit) {
  alignas(32) Pair pairs[kLanes / 2];
  each_vector(size, [&](int64_t i, Mask lanes) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), lower_halves(whole(load(x + i, lanes), scale)));
    const int64_t count = (std::min(kLanes, size - i) + 1) / 2;
    for (int64_t p = 0; p < count; ++p) emit(i / 2 + p, pairs[p]);
  });
}

// Keeps a token's key and value at a slot of its block.
inline void keep(const float* key, const float* value, int64_t size, int64_t slot, const Block<float>& block) {
  for (int64_t i = 0; i < size; ++i) block.keys[i * kBlock + slot] = key[i];
  std::copy_n(value, size, block.values + slot * size);
}

inline void keep(const float* key, const float* value, int64_t size, int64_t slot, const Block<Pair>& block) {
  const float scale = block.key_scales[slot] = scale_of(key, size, kKeyLimit);
  each_pair(key, size, scale, [&](int64_t cell, Pair pair) { block.keys[cell * kBlock + slot] = pair; });
  const float unit = block.value_scales[slot] = scale_of(value, size, kLimit);
  const int half = slot % 2;  // of each pair, that which is this token's
  each_vector(size, [&](int64_t i, Mask lanes) {
    store_half(block.values + slot / 2 * size + i, whole(load(value + i, lanes), unit), half, lanes);
  });
}

// Into the first cache.
inline void call_for(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kCacheLine / sizeof(float)) _mm_prefetch(from + i, _MM_HINT_T0);
}

// Norms and rotates queries and keys of rows begin … end - 1 of a chunk, in place in qkv[rows, width], for one head of
// keys and the queries that ask it, and keeps keys and values. A block's first token clears the block: what a longer
// sequence left there must not reach sums, not even times 0.
template <class C>
void remember(float* qkv, const Step& step, int64_t chunk, int64_t begin, int64_t end, int64_t head, const Heads& heads,
              const Look& look, const Kept<C>& kept) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = step.positions[row], slot = position % kBlock;
    float* line = qkv + row * heads.width();
    if (row + 1 < end) {
      const float* next = line + heads.width();
      call_for(next + head * heads.group() * heads.size, heads.group() * heads.size);
      call_for(next + (heads.query + head) * heads.size, heads.size);
      call_for(next + (heads.query + heads.key + head) * heads.size, heads.size);
    }
    const auto turned = [&](float* x, const float* weight) {
      if (weight != nullptr) norm_row(x, heads.size, Norm{weight, nullptr, look.eps, false}, x);
      if (look.rotary > 0) rotate(x, look.rotary, look.rotation + position * look.rotary);
    };
    for (int64_t h = head * heads.group(); h < (head + 1) * heads.group(); ++h)
      turned(line + h * heads.size, look.query_norm);
    float* key = line + (heads.query + head) * heads.size;
    turned(key, look.key_norm);
    const Block<C> block = kept.at(heads, step.block(chunk, position), head);
    if (slot == 0) std::fill(block.keys, block.keys + kept.stride(heads), C(0));
    keep(key, key + heads.key * heads.size, heads.size, slot, block);
  }
}

// Into the second cache: the first has room for few lines on their way (16 streams of 1,000 tokens: 21.0 ms, were 27.3).
inline void call_for(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }

inline Floats real(Floats x) { return x; }

// What L lines of cells, times S vectors of 16 at once, come to.
template <int L, int S, class C>
struct Products {
  decltype(spread(C())) at[L][S];

  void clear() {
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l)
      for (int s = 0; s < S; ++s) at[l][s] = spread(C(0));
  }

  // Adds cell(l) of each line times the cells vector(s).
  template <class F, class V>
  void add(F cell, V vector) {
    decltype(spread(C())) vectors[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) vectors[s] = vector(s);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const auto by = spread(cell(l));
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) at[l][s] = add_products(at[l][s], by, vectors[s]);
    }
  }
};

// scores[L][kBlock] = queries[cells][L] · keys[cells][kBlock], each sum from the first cell to the last, times `scales` of
// queries and keys of pairs. ahead: what will be read next, and is called for if `kCall`.
template <int L, bool kCall, class C>
void score_block(const C* queries, const float* scales, const Block<C>& block, int64_t cells, float* scores,
                 const Block<C>& ahead) {
  constexpr int S = kVectors<L>;
#pragma GCC unroll 2
  for (int64_t slot = 0; slot < kBlock; slot += S * kLanes)
    for (int64_t from = 0; from < cells; from += kCells<C>) {
      const int64_t to = std::min(cells, from + kCells<C>);
      Products<L, S, C> products;
      products.clear();
      for (int64_t i = from; i < to; ++i) {
        const int64_t at = i * kBlock + slot;
        if constexpr (kCall)
          for (int s = 0; s < S; ++s) call_for(ahead.keys + at + s * kLanes);
        products.add([&](int l) { return queries[i * L + l]; }, [&](int s) { return load(block.keys + at + s * kLanes); });
      }
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l)
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
          float* score = scores + l * kBlock + slot + s * kLanes;
          Floats found = real(products.at[l][s]);
          if constexpr (std::is_same_v<C, Pair>)
            found = mul(found, mul(load(block.key_scales + slot + s * kLanes), spread(scales[l])));
          store(score, from == 0 ? found : add(load(score), found));
        }
    }
}

// The softmax so far of lines that go through the keys together (arXiv:2205.14135).
struct Lines {
  float* largest;  // [lines]: the largest score
  float* totals;   // [lines][kLanes]: sums of weights, each lane's
  float* fade;     // [lines]: what becomes of sums before a block
  float* gain;     // [lines]: and the factor of the block's own
  float* peak;     // [lines]: its largest score
};

// sums[L][size] · fade + weights[L][kBlock] · values[kBlock][size] · gain, for S vectors of dimensions from `i` on, all of
// them whole if `kWhole`, a block's sum from its first key to its last.
template <int L, bool kCall, bool kWhole, class C>
void mix_columns(const C* weights, const float* fades, const float* gains, const C* values, int64_t size, int64_t i,
                 float* sums, const C* ahead) {
  constexpr int S = kVectors<L>;
  const auto lanes = [&](int s) {
    if constexpr (kWhole)
      return All{};
    else
      return first_lanes(size - i - s * kLanes);
  };
  Products<L, S, C> products;
  products.clear();
  for (int64_t j = 0; j < kBlock / kWidth<C>; ++j) {
    const int64_t at = j * size + i;
    if constexpr (kCall)
      for (int s = 0; s < S; ++s) call_for(ahead + at + s * kLanes);
    products.add([&](int l) { return weights[l * kBlock + j]; },
                 [&](int s) { return load(values + at + s * kLanes, lanes(s)); });
  }
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    const Floats fade = spread(fades[l]), gain = spread(gains[l]);
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) {
      float* to = sums + l * size + i + s * kLanes;
      store(to, fmadd(real(products.at[l][s]), gain, mul(load(to, lanes(s)), fade)), lanes(s));
    }
  }
}

// As `mix_columns`, for all dimensions.
template <int L, bool kCall, class C>
void mix_block(const C* weights, const float* fades, const float* gains, const C* values, int64_t size, float* sums,
               const C* ahead) {
  constexpr int64_t kStep = kVectors<L> * kLanes;
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) mix_columns<L, kCall, true>(weights, fades, gains, values, size, i, sums, ahead);
  if (i < size) mix_columns<L, kCall, false>(weights, fades, gains, values, size, i, sums, ahead);
}

// The scales of a block's values that are seen, as parts of `kLimit`, the largest of them; nothing of float32 values.
struct Shares {
  Floats first, second;
  float largest;

  Shares(const Block<Pair>& block, uint32_t seen) {
    const Floats left = load(block.value_scales, static_cast<Mask>(seen));
    const Floats right = load(block.value_scales + kLanes, static_cast<Mask>(seen >> kLanes));
    const Wholes bits = unsigned_max(as_wholes(left), as_wholes(right));
    largest = std::bit_cast<float>(unsigned_largest(bits));  // NaN if one is
    const Floats over = spread(largest == 0.0f ? 0.0f : kLimit / largest);
    first = mul(left, over);
    second = mul(right, over);
  }
  Shares(const Block<float>&, uint32_t) {}

  // Weights as they are multiplied with values; returns what products of those with values are to be multiplied with.
  float put(Floats left, Floats right, float* to) const {
    store(to, left);
    store(to + kLanes, right);
    return 1.0f;
  }
  float put(Floats left, Floats right, Pair* to) const {
    const auto narrow = [](Floats x) { return lower_halves(nearest(x)); };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(mul(left, first)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kLanes / 2), narrow(mul(right, second)));
    return largest / kLimit;
  }
};

// What scores become before they are compared: those of pairs count in powers of 2, which cost fewer operations.
template <class C>
constexpr float kUnit = std::is_same_v<C, Pair> ? kLog2E : 1.0f;

template <class C>
Floats power(Floats x) {
  if constexpr (std::is_same_v<C, Pair>)
    return power_of_two(x);
  else
    return exponential(x);
}

// The largest of each line's scores of a block.
inline void find_peaks(const float* scores, int64_t lines, float* peaks) {
  const auto larger = [&](int64_t l) { return max(load(scores + l * kBlock), load(scores + l * kBlock + kLanes)); };
  int64_t l = 0;
  for (; l + kLanes <= lines; l += kLanes) store(peaks + l, largest_of_each([&](int64_t i) { return larger(l + i); }));
  for (; l < lines; ++l) peaks[l] = largest(larger(l));
}

// Masks a line's scores of keys that are not `seen`.
inline void mask(float* scores, uint32_t seen) {
  store(scores, select(static_cast<Mask>(seen), load(scores), spread(kMasked)));
  store(scores + kLanes, select(static_cast<Mask>(seen >> kLanes), load(scores + kLanes), spread(kMasked)));
}

// Once the peaks of a block are known: what sums before it fade to, and what it counts for itself. Of nothing but masked
// scores the gain is 0, and the fade 1 to the last bit: a line must not notice blocks that only its company sees.
template <class C>
void advance(const Lines& lines, int64_t count) {
  each_vector(count, [&](int64_t l, Mask lanes) {
    const Floats before = load(lines.largest + l, lanes), peak = load(lines.peak + l, lanes);
    const Floats now = max(before, peak);
    store(lines.fade + l, power<C>(sub(before, now)), lanes);
    store(lines.gain + l, power<C>(sub(peak, now)), lanes);
    store(lines.largest + l, now, lanes);
  });
}

// Turns the scores [lines][kBlock] of a block into weights, in their place, those of lines begin … end - 1.
template <class C>
void weigh(float* scores, const Lines& lines, int64_t begin, int64_t end, const Shares& shares) {
  for (int64_t l = begin; l < end; ++l) {
    float *line = scores + l * kBlock, *total = lines.totals + l * kLanes;
    const Floats peak = spread(lines.peak[l]);
    const Floats low = power<C>(sub(load(line), peak));
    const Floats high = power<C>(sub(load(line + kLanes), peak));
    const Floats before = mul(load(total), spread(lines.fade[l]));
    store(total, fmadd(add(low, high), spread(lines.gain[l]), before));
    lines.gain[l] *= shares.put(low, high, reinterpret_cast<C*>(line));
  }
}

// Which of the 32 keys from `start` on a query at `position` sees.
inline uint32_t seen_keys(int64_t position, int64_t start, int64_t window) {
  const auto below = [](int64_t count) -> uint64_t { return (uint64_t{1} << std::clamp<int64_t>(count, 0, kBlock)) - 1; };
  const uint64_t too_old = window > 0 ? below(position - window + 1 - start) : 0;
  return static_cast<uint32_t>(below(position - start + 1) & ~too_old);
}

// Rows of one chunk that go through the keys together.
struct Tile {
  int64_t chunk, row, count;
};

// The first block whose keys a tile's queries see.
inline int64_t first_block(const Step& step, const Tile& tile, const Look& look) {
  return look.window > 0 ? std::max<int64_t>(0, step.positions[tile.row] - look.window + 1) / kBlock : 0;
}

// Queries of a tile against all their keys, for one head of keys. after: what is likely read next.
template <class T, class C>
void attend_tile(const float* qkv, const Step& step, const Tile& tile, int64_t head, const Heads& heads,
                 const Look& look, const Kept<C>& kept, const Block<C>& after, const Inputs<T>& out) {
  const auto [chunk, row, count] = tile;
  static thread_local Arena arena;
  const int64_t group = heads.group(), size = heads.size, lines = count * group, cells = cells_of<C>(size);
  float* sums = arena.floats(lines * (size + cells + kBlock + kLanes + 5));  // [lines][size]
  C* queries = reinterpret_cast<C*>(sums + lines * size);                    // of each group of lines [cells][lines]
  float* scores = reinterpret_cast<float*>(queries + lines * cells);         // [lines][kBlock], then weights
  float* totals = scores + lines * kBlock;
  float* rest = totals + lines * kLanes;
  float* scales = rest + 4 * lines;  // [lines], of pairs
  const Lines state{rest, totals, rest + lines, rest + 2 * lines, rest + 3 * lines};
  std::fill_n(state.largest, lines, kMasked);
  std::fill_n(totals, lines * kLanes, 0.0f);
  const auto query_of = [&](int64_t l) { return qkv + (row + l / group) * heads.width() + (head * group + l % group) * size; };
  const auto gather = [&]<int kMost>() {
    each_group<kMost>(lines, [&](auto many, int64_t from) {
      for (int64_t l = from; l < from + many.value; ++l) {
        const float* query = query_of(l);
        call_for(query_of(std::min(l + kSoon, lines - 1)), size);
        C* to = queries + from * cells + l - from;
        if constexpr (std::is_same_v<C, Pair>) {
          const float scale = scale_of(query, size, kLimit);
          scales[l] = scale * look.scale * kUnit<C>;
          each_pair(query, size, scale, [&](int64_t cell, Pair pair) { to[cell * many.value] = pair; });
        } else {
          for (int64_t i = 0; i < size; ++i) to[i * many.value] = query[i] * look.scale;
        }
      }
    });
  };
  lines <= kDirect ? gather.template operator()<kDirect>() : gather.template operator()<kRows>();
  std::fill_n(sums, lines * size, 0.0f);
  const int64_t first = step.positions[row], last = first + count - 1;
  const auto pass = [&]<int kMost>(const Block<C>& block, const Block<C>& ahead, int64_t begin) {
    if constexpr (kMost == kDirect && std::is_same_v<C, Pair>)
      for (int64_t i = 0; i < 2 * kBlock; i += kLanes) call_for(ahead.key_scales + i);
    each_group<kMost>(lines, [&](auto many, int64_t l) {
      score_block<many.value, kMost == kDirect>(queries + l * cells, scales + l, block, cells, scores + l * kBlock, ahead);
    });
    if (look.slopes != nullptr)
      for (int64_t l = 0; l < lines; ++l)
        for (int64_t i = 0; i < kBlock; ++i)
          scores[l * kBlock + i] += look.slopes[head * group + l % group] * kUnit<C> * (begin + i);
    const auto seen_by = [&](int64_t q) { return seen_keys(first + q, begin, look.window); };
    const bool by_all = (seen_by(0) & seen_by(count - 1)) == kAll;
    if (!by_all)
      for (int64_t l = 0; l < lines; ++l) mask(scores + l * kBlock, seen_by(l / group));
    find_peaks(scores, lines, state.peak);
    advance<C>(state, lines);
    if (by_all)
      weigh<C>(scores, state, 0, lines, Shares(block, kAll));
    else
      for (int64_t q = 0; q < count; ++q) weigh<C>(scores, state, q * group, (q + 1) * group, Shares(block, seen_by(q)));
    each_group<kMost>(lines, [&](auto many, int64_t l) {
      mix_block<many.value, kMost == kDirect>(reinterpret_cast<const C*>(scores + l * kBlock), state.fade + l,
                                              state.gain + l, block.values, size, sums + l * size, ahead.values);
    });
  };
  for (int64_t b = first_block(step, tile, look); b <= last / kBlock; ++b) {
    const auto at = [&](int64_t which) { return kept.at(heads, step.block(chunk, which * kBlock), head); };
    if (lines <= kDirect)
      pass.template operator()<kDirect>(at(b), b < last / kBlock ? at(b + 1) : after, b * kBlock);
    else
      pass.template operator()<kRows>(at(b), after, b * kBlock);
  }
  for (int64_t l = 0; l < lines; ++l) {
    const int64_t start = (head * group + l % group) * size;
    const Floats share = spread(1.0f / sum(load(totals + l * kLanes)));
    each_vector(size, [&](int64_t i, Mask lanes) {
      store(out.at(row + l / group, start + i), mul(load(sums + l * size + i, lanes), share), lanes);
    });
  }
}

// A step's rows cut for attention. If no chunk is cut, a tile's own keys are all it adds, so that whoever attends with
// it can keep them first; else all keys must be kept before any are read.
struct Tiles {
  std::vector<Tile> tiles;
  std::vector<Tile> blocks;  // rows by the block they are kept in; empty if tiles keep their own
};

inline Tiles cut(const Step& step, const Heads& heads) {
  const int64_t height = std::max<int64_t>(8, kLines / heads.group());
  Tiles found;
  bool whole = true;
  for (int64_t c = 0; c < step.chunks; ++c) {
    whole = whole && step.first[c + 1] - step.first[c] <= height;
    for (int64_t row = step.first[c]; row < step.first[c + 1]; row += height)
      found.tiles.push_back({c, row, std::min(height, step.first[c + 1] - row)});
  }
  if (whole) return found;
  for (int64_t c = 0; c < step.chunks; ++c)
    for (int64_t row = step.first[c]; row < step.first[c + 1];) {
      const int64_t count = std::min(kBlock - step.positions[row] % kBlock, step.first[c + 1] - row);
      found.blocks.push_back({c, row, count});
      row += count;
    }
  return found;
}

// The keys and values of one layer that a step's single rows attend to. `blocks` is room for the answer.
template <class C>
Later read_by(const Step& step, const Tiles& cuts, const Heads& heads, const Look& look, const Kept<C>& kept,
              std::vector<int64_t>& blocks) {
  blocks.clear();
  for (const Tile& tile : cuts.tiles)
    if (tile.count == 1)
      for (int64_t b = first_block(step, tile, look); b <= step.positions[tile.row] / kBlock; ++b)
        blocks.push_back(step.block(tile.chunk, b * kBlock));
  const int64_t bytes = heads.key * kept.stride(heads) * static_cast<int64_t>(sizeof(C));
  const char* base = reinterpret_cast<const char*>(kept.at(heads, 0, 0).keys);
  return {base, blocks.data(), static_cast<int64_t>(blocks.size()), kept.layers * bytes, bytes};
}

// out [rows, query heads · size] of a layer whose queries, keys and values are qkv[rows, width]. By every member.
template <class T, class C>
void attend(Team& team, float* qkv, const Step& step, const Tiles& cuts, const Heads& heads, const Look& look,
            const Kept<C>& kept, const Inputs<T>& out) {
  const int64_t count = cuts.blocks.size() * heads.key;
  if (count > 0)
    team.each(count, [&](int64_t i) {
      const Tile& b = cuts.blocks[i / heads.key];
      remember(qkv, step, b.chunk, b.row, b.row + b.count, i % heads.key, heads, look, kept);
    });
  const int64_t tasks = cuts.tiles.size() * heads.key;
  team.each(tasks, [&](int64_t i) {
    const Tile& t = cuts.tiles[i / heads.key];
    const int64_t head = i % heads.key, next = std::min(i + 1, tasks - 1);
    if (count == 0) remember(qkv, step, t.chunk, t.row, t.row + t.count, head, heads, look, kept);
    const Tile& later = cuts.tiles[next / heads.key];
    const int64_t block = step.block(later.chunk, first_block(step, later, look) * kBlock);
    attend_tile(qkv, step, t, head, heads, look, kept, kept.at(heads, block, next % heads.key), out);
  });
}

}  // namespace logprobs
