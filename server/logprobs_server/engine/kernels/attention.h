// Attention over keys and values in blocks. A query goes through its keys block by block, first to last, whatever is
// computed beside it, and each sum runs in one order: its bits depend on its position and what precedes it alone.
#pragma once

#include <vector>

#include "product.h"

namespace logprobs {

constexpr int64_t kBlock = 32;  // tokens in a block of the KV cache; BLOCK_SIZE in kv_cache.py
constexpr int64_t kLines = 48;  // queries of heads that go through the same keys together
constexpr int kDirect = 4;      // queries up to which keys and values are not worth a copy in float32

// Memory of one thread, kept from call to call: fresh pages cost more than what is computed in them.
class Arena {
 public:
  float* floats(int64_t count) {
    if (count > capacity_) {
      capacity_ = count;
      floats_.reset(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
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
  int64_t plane() const { return size * kBlock; }
};

// One layer's part of the cache, [blocks][layers][heads][keys [size][kBlock], values [kBlock][size]]. K is what keys
// and values are kept as: float32 of a float32 model; float16 of a bfloat16 one, as small and eight times finer.
template <class K>
struct Kept {
  K* base;
  int64_t layers, layer;

  K* keys(const Heads& heads, int64_t block, int64_t head) const {
    return base + ((block * layers + layer) * heads.key + head) * 2 * heads.plane();
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

// Norms and rotates queries and keys of rows begin … end - 1 of a chunk, in place in qkv[rows, width], for one head of
// keys and the queries that ask it, and keeps keys and values. A block's first token clears the block: what a longer
// sequence left there must not reach sums, not even times 0.
template <class K>
void remember(float* qkv, const Step& step, int64_t chunk, int64_t begin, int64_t end, int64_t head, const Heads& heads,
              const Look& look, const Kept<K>& kept) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = step.positions[row], slot = position % kBlock;
    float* line = qkv + row * heads.width();
    const auto turned = [&](float* x, const float* weight) {
      if (weight != nullptr) norm_row(x, heads.size, Norm{weight, nullptr, look.eps, false}, x);
      if (look.rotary > 0) rotate(x, look.rotary, look.rotation + position * look.rotary);
    };
    for (int64_t h = head * heads.group(); h < (head + 1) * heads.group(); ++h)
      turned(line + h * heads.size, look.query_norm);
    float* key = line + (heads.query + head) * heads.size;
    turned(key, look.key_norm);
    K* keys = kept.keys(heads, step.block(chunk, position), head);
    if (slot == 0) std::fill_n(keys, 2 * heads.plane(), K(0));
    const float* value = key + heads.key * heads.size;
    K* values = keys + heads.plane() + slot * heads.size;
    alignas(64) K narrow[kLanes];
    each_vector(heads.size, [&](int64_t i, __mmask16 lanes) {
      store(narrow, load(key + i, lanes));
      for (int64_t j = 0; j < std::min(kLanes, heads.size - i); ++j) keys[(i + j) * kBlock + slot] = narrow[j];
      store(values + i, load(value + i, lanes), lanes);
    });
  }
}

// Into the second cache: the first has room for few lines on their way (16 streams of 1,000 tokens: 21.0 ms, were 27.3).
inline void call_for(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }

// scores[L][kBlock] = queries[size][L] · keys[size][kBlock], each sum from the first dimension to the last.
// ahead: what will be read next, as many bytes as `keys`.
template <int L, class S>
void score_block(const float* queries, const S* keys, int64_t size, float* scores, const S* ahead) {
  __m512 sums[L][2];
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) sums[l][0] = sums[l][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; ++i) {
    const __m512 left = load(keys + i * kBlock), right = load(keys + i * kBlock + kLanes);
    if constexpr (L <= kDirect)
      for (size_t at = 0; at < kBlock; at += 64 / sizeof(S)) call_for(ahead + i * kBlock + at);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const __m512 query = _mm512_set1_ps(queries[i * L + l]);
      sums[l][0] = _mm512_fmadd_ps(query, left, sums[l][0]);
      sums[l][1] = _mm512_fmadd_ps(query, right, sums[l][1]);
    }
  }
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    store(scores + l * kBlock, sums[l][0]);
    store(scores + l * kBlock + kLanes, sums[l][1]);
  }
}

// sums[L][size] += weights[L][kBlock] · values[kBlock][size] for 32 dimensions from `i` on, those in the masks, a
// block's sum from its first key to its last.
template <int L, class S, class M>
void mix_columns(const float* weights, const S* values, int64_t size, int64_t i, float* sums, const S* ahead, M first,
                 M second) {
  __m512 mixed[L][2];
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) mixed[l][0] = mixed[l][1] = _mm512_setzero_ps();
  for (int64_t j = 0; j < kBlock; ++j) {
    const S* line = values + j * size + i;
    const __m512 left = load(line, first), right = load(line + kLanes, second);
    if constexpr (L <= kDirect)
      for (size_t at = 0; at < 2 * kLanes; at += 64 / sizeof(S)) call_for(ahead + j * size + i + at);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      const __m512 weight = _mm512_set1_ps(weights[l * kBlock + j]);
      mixed[l][0] = _mm512_fmadd_ps(weight, left, mixed[l][0]);
      mixed[l][1] = _mm512_fmadd_ps(weight, right, mixed[l][1]);
    }
  }
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    float* to = sums + l * size + i;
    store(to, _mm512_add_ps(load(to, first), mixed[l][0]), first);
    store(to + kLanes, _mm512_add_ps(load(to + kLanes, second), mixed[l][1]), second);
  }
}

// sums[L][size] += weights[L][kBlock] · values[kBlock][size].
template <int L, class S>
void mix_block(const float* weights, const S* values, int64_t size, float* sums, const S* ahead) {
  const int64_t even = size / (2 * kLanes) * (2 * kLanes);
  for (int64_t i = 0; i < even; i += 2 * kLanes) mix_columns<L>(weights, values, size, i, sums, ahead, All{}, All{});
  if (even < size) {
    const __mmask16 first = first_lanes(size - even), second = first_lanes(size - even - kLanes);
    mix_columns<L>(weights, values, size, even, sums, ahead, first, second);
  }
}

// One query's softmax so far (arXiv:2205.14135): its largest score, the sum of its weights, the sums of values.
struct Line {
  float largest, total;
};

// Turns a line's scores of a block into weights, of keys `seen` alone, and fades what came before to their scale.
inline void weigh(float* scores, __mmask32 seen, Line& line, float* sums, int64_t size) {
  const __mmask16 first = static_cast<__mmask16>(seen), second = static_cast<__mmask16>(seen >> kLanes);
  const __m512 masked = _mm512_set1_ps(kMasked);
  const __m512 left = _mm512_mask_mov_ps(masked, first, load(scores));
  const __m512 right = _mm512_mask_mov_ps(masked, second, load(scores + kLanes));
  const float peak = _mm512_reduce_max_ps(_mm512_max_ps(left, right));
  if (peak == kMasked) {  // nothing of this block counts
    std::fill_n(scores, kBlock, 0.0f);
    return;
  }
  const float now = std::max(line.largest, peak);
  if (now > line.largest) {
    const __m512 fade = exponential(_mm512_set1_ps(line.largest - now));
    line.total *= _mm512_cvtss_f32(fade);
    each_vector(size, [&](int64_t i, __mmask16 lanes) { store(sums + i, _mm512_mul_ps(load(sums + i, lanes), fade), lanes); });
    line.largest = now;
  }
  const __m512 low = exponential(_mm512_sub_ps(left, _mm512_set1_ps(now)));
  const __m512 high = exponential(_mm512_sub_ps(right, _mm512_set1_ps(now)));
  store(scores, low);
  store(scores + kLanes, high);
  line.total += _mm512_reduce_add_ps(_mm512_add_ps(low, high));
}

// Which of the 32 keys from `start` on a query at `position` sees.
inline __mmask32 seen_keys(int64_t position, int64_t start, int64_t window) {
  const auto below = [](int64_t count) -> uint64_t { return (uint64_t{1} << std::clamp<int64_t>(count, 0, kBlock)) - 1; };
  const uint64_t too_old = window > 0 ? below(position - window + 1 - start) : 0;
  return static_cast<__mmask32>(below(position - start + 1) & ~too_old);
}

// Rows of one chunk that go through the keys together.
struct Tile {
  int64_t chunk, row, count;
};

// The first block whose keys a tile's queries see.
inline int64_t first_block(const Step& step, const Tile& tile, const Look& look) {
  return look.window > 0 ? std::max<int64_t>(0, step.positions[tile.row] - look.window + 1) / kBlock : 0;
}

// Queries of a tile against all their keys, for one head of keys. after: keys that are likely read next.
template <class T, class K>
void attend_tile(const float* qkv, const Step& step, const Tile& tile, int64_t head, const Heads& heads,
                 const Look& look, const Kept<K>& kept, const K* after, T* out) {
  const auto [chunk, row, count] = tile;
  static thread_local Arena arena;
  const int64_t group = heads.group(), size = heads.size, lines = count * group, plane = heads.plane();
  float* queries = arena.floats(lines * (2 * size + kBlock) + 2 * plane);  // of each group of lines [size][lines]
  float* sums = queries + lines * size;                                    // [lines][size]
  float* scores = sums + lines * size;                                     // [lines][kBlock]
  float* wide = scores + lines * kBlock;                                   // a block's keys, then values, in float32
  static thread_local std::vector<Line> state;
  state.assign(lines, Line{kMasked, 0.0f});
  const auto gather = [&]<int kMost>() {
    each_group<kMost>(lines, [&](auto many, int64_t from) {
      for (int64_t l = from; l < from + many.value; ++l) {
        const float* query = qkv + (row + l / group) * heads.width() + (head * group + l % group) * size;
        for (int64_t i = 0; i < size; ++i) queries[from * size + i * many.value + l - from] = query[i] * look.scale;
      }
    });
  };
  lines <= kDirect ? gather.template operator()<kDirect>() : gather.template operator()<kRows>();
  std::fill_n(sums, lines * size, 0.0f);
  const int64_t first = step.positions[row], last = first + count - 1;
  const auto pass = [&]<int kMost, class S>(const S* keys, const S* ahead, int64_t begin) {
    each_group<kMost>(lines, [&](auto many, int64_t l) {
      score_block<many.value>(queries + l * size, keys, size, scores + l * kBlock, ahead);
    });
    for (int64_t l = 0; l < lines; ++l) {
      float* line = scores + l * kBlock;
      if (look.slopes != nullptr)
        for (int64_t i = 0; i < kBlock; ++i) line[i] += look.slopes[head * group + l % group] * (begin + i);
      weigh(line, seen_keys(first + l / group, begin, look.window), state[l], sums + l * size, size);
    }
    each_group<kMost>(lines, [&](auto many, int64_t l) {
      mix_block<many.value>(scores + l * kBlock, keys + plane, size, sums + l * size, ahead + plane);
    });
  };
  for (int64_t b = first_block(step, tile, look); b <= last / kBlock; ++b) {
    const K* keys = kept.keys(heads, step.block(chunk, b * kBlock), head);
    if (lines <= kDirect) {
      const K* ahead = b < last / kBlock ? kept.keys(heads, step.block(chunk, (b + 1) * kBlock), head) : after;
      pass.template operator()<kDirect>(keys, ahead, b * kBlock);
    } else {
      for (int64_t i = 0; i < 2 * plane; i += kLanes) store(wide + i, load(keys + i));
      pass.template operator()<kRows>(wide, wide, b * kBlock);
    }
  }
  for (int64_t l = 0; l < lines; ++l) {
    T* to = out + ((row + l / group) * heads.query + head * group + l % group) * size;
    const __m512 share = _mm512_set1_ps(1.0f / state[l].total);
    each_vector(size, [&](int64_t i, __mmask16 lanes) {
      store(to + i, _mm512_mul_ps(load(sums + l * size + i, lanes), share), lanes);
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
  for (int64_t c = step.chunks - 1; c >= 0; --c) {
    whole = whole && step.first[c + 1] - step.first[c] <= height;
    for (int64_t row = step.first[c + 1]; row > step.first[c];) {
      const int64_t count = std::min(height, row - step.first[c]);
      row -= count;  // the longest first, so that the last to be taken are short
      found.tiles.push_back({c, row, count});
    }
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

// out[rows, query heads · size] of a layer whose queries, keys and values are qkv[rows, width]. By every member.
template <class T, class K>
void attend(Team& team, float* qkv, const Step& step, const Tiles& cuts, const Heads& heads, const Look& look,
            const Kept<K>& kept, T* out) {
  const int64_t count = cuts.blocks.size() * heads.key;
  if (count > 0)
    team.each(count, [&](int64_t i) {
      const Tile& b = cuts.blocks[i / heads.key];
      remember(qkv, step, b.chunk, b.row, b.row + b.count, i % heads.key, heads, look, kept);
    });
  const int64_t tasks = cuts.tiles.size() * heads.key;
  team.each(tasks, [&](int64_t i) {
    const Tile& t = cuts.tiles[i / heads.key];
    const int64_t head = i % heads.key, next = std::min(i + team.size(), tasks - 1);
    if (count == 0) remember(qkv, step, t.chunk, t.row, t.row + t.count, head, heads, look, kept);
    const Tile& later = cuts.tiles[next / heads.key];
    const int64_t block = step.block(later.chunk, first_block(step, later, look) * kBlock);
    attend_tile(qkv, step, t, head, heads, look, kept, kept.keys(heads, block, next % heads.key), out);
  });
}

}  // namespace logprobs
