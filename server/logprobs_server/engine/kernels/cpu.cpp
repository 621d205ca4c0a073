// The CPU's kernels: one decoder layer over rows of many sequences, and the products it is made of.
//
// Every row's bits depend on that row alone: products reduce over the inner dimension in one order whatever the number
// of rows, and attention goes through its keys in blocks that start at multiples of the block size, first to last.
// Residual stream, norms, attention, activations and all sums are float32; products take bfloat16 or float32 inputs.
// Knows nothing of requests or schedules. Tensors are checked by the Python side that owns them.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

namespace {

using at::BFloat16;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kColumns = 32;  // columns of a product that one block of packed weights gives
constexpr int64_t kInputs = 64;   // inputs that one float32 sum takes before it is added to the others
constexpr int64_t kRows = 64;     // rows of a product computed at a time
constexpr int64_t kBlock = 32;    // tokens in a block of the KV cache; BLOCK_SIZE in kv_cache.py
constexpr int64_t kTile = 16;     // queries of one sequence that go through the keys together
constexpr float kMasked = -std::numeric_limits<float>::infinity();

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
constexpr bool kHalf = std::is_same_v<T, BFloat16>;

// ---- products

// Weights [out, in] as blocks of 32 outputs: [blocks][in][32], bfloat16 in pairs of inputs, [blocks][in / 2][32][2].
Tensor pack(const Tensor& weight) {
  const int64_t out = weight.size(0), in = weight.size(1), blocks = (out + kColumns - 1) / kColumns;
  TORCH_CHECK(weight.scalar_type() == at::kFloat || in % 2 == 0, "an odd number of inputs in bfloat16");
  const Tensor padded = at::constant_pad_nd(weight, {0, 0, 0, blocks * kColumns - out});
  if (weight.scalar_type() == at::kFloat) return padded.view({blocks, kColumns, in}).permute({0, 2, 1}).contiguous();
  return padded.view({blocks, kColumns, in / 2, 2}).permute({0, 2, 1, 3}).contiguous();
}

// out[rows, outputs] = x[rows, in] · weightᵀ + bias, added to what `out` holds if `add`. Leading dimension of x: ldx.
// float32 sums run over `kInputs` inputs at a time and are then added up, which halves the error of one long sum.
template <class T>
void product(const T* x, int64_t rows, int64_t ldx, const Tensor& packed, const float* bias, int64_t outputs, float* out,
             bool add) {
  const int64_t blocks = packed.size(0), in = packed.numel() / (blocks * kColumns);
  const int64_t stride = kHalf<T> ? in : kInputs;
  const T* weights = data<T>(packed);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kRows * kColumns];
    for (int64_t b = begin; b < end; ++b) {
      const int64_t column = b * kColumns, width = std::min(kColumns, outputs - column);
      for (int64_t row = 0; row < rows; row += kRows) {
        const int64_t count = std::min(kRows, rows - row);
        for (int64_t i = 0; i < in; i += stride)
          at::native::cpublas::brgemm(count, kColumns, std::min(stride, in - i), ldx, kColumns, kColumns, i > 0,
                                      x + row * ldx + i, weights + (b * in + i) * kColumns, tile, kHalf<T>);
        for (int64_t r = 0; r < count; ++r) {
          float* to = out + (row + r) * outputs + column;
          const float* from = tile + r * kColumns;
          for (int64_t c = 0; c < width; ++c)
            to[c] = (add ? to[c] : 0.0f) + (bias != nullptr ? from[c] + bias[column + c] : from[c]);
        }
      }
    }
    at::native::cpublas::brgemm_release(kHalf<T>);
  });
}

// ---- rows

inline float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, v);
}

template <class T>
inline void store(T* to, Vec values, int64_t count) {
  if constexpr (kHalf<T>) {
    alignas(64) float plain[Vec::size()];
    values.store(plain);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<BFloat16>(plain[i]);
  } else {
    values.store(to, count);
  }
}

template <class F>
inline void each(int64_t size, F f) {
  for (int64_t i = 0; i < size; i += Vec::size()) f(i, std::min<int64_t>(Vec::size(), size - i));
}

// out = norm(x) · weight + bias, of one row; mean is subtracted if `centred` (LayerNorm), else not (RMSNorm).
template <class T>
void norm_row(const float* x, int64_t size, const float* weight, const float* bias, float eps, bool centred, T* out,
              bool add) {
  float mean = 0.0f;
  if (centred) {
    Vec total(0.0f);
    each(size, [&](int64_t i, int64_t n) { total = total + Vec::loadu(x + i, n); });
    mean = sum(total) / size;
  }
  Vec squares(0.0f);
  each(size, [&](int64_t i, int64_t n) {
    Vec value = Vec::loadu(x + i, n) - Vec(mean);
    if (n < Vec::size()) value = Vec::set(Vec(0.0f), value, n);
    squares = squares + value * value;
  });
  const Vec scale(1.0f / std::sqrt(sum(squares) / size + eps));
  each(size, [&](int64_t i, int64_t n) {
    Vec value = (Vec::loadu(x + i, n) - Vec(mean)) * scale * Vec::loadu(weight + i, n);
    if (bias != nullptr) value = value + Vec::loadu(bias + i, n);
    if constexpr (!kHalf<T>) {
      if (add) value = value + Vec::loadu(reinterpret_cast<const float*>(out) + i, n);
    }
    store(out + i, value, n);
  });
}

struct Norm {
  const float* weight;
  const float* bias;
  float eps;
  bool centred;
};

template <class T>
void norm(const float* x, int64_t rows, int64_t size, const Norm& how, T* out, bool add = false) {
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      norm_row(x + r * size, size, how.weight, how.bias, how.eps, how.centred, out + r * size, add);
  });
}

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

inline Vec activated(Vec x, int64_t kind) {
  const Vec one(1.0f), half(0.5f);
  switch (kind) {
    case kSilu:
      return x / (one + x.neg().exp());
    case kGeluTanh:
      return half * x * (one + (Vec(0.7978845608028654f) * (x + Vec(0.044715f) * x * x * x)).tanh());
    case kGelu:
      return half * x * (one + (x * Vec(0.7071067811865476f)).erf());
    default:
      return at::vec::maximum(x, Vec(0.0f));
  }
}

// out[rows, size] = activation(x), times the second half of x[rows, 2 size] if gated.
template <class T>
void activate(const float* x, int64_t rows, int64_t size, int64_t kind, bool gated, T* out) {
  const int64_t width = gated ? 2 * size : size;
  at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      each(size, [&](int64_t i, int64_t n) {
        Vec value = activated(Vec::loadu(x + r * width + i, n), kind);
        if (gated) value = value * Vec::loadu(x + r * width + size + i, n);
        store(out + r * size + i, value, n);
      });
  });
}

// ---- attention

// Memory for one call, kept for the next: fresh pages cost more than what is computed in them.
class Arena {
 public:
  // Everything taken before is given up; there is room for `count` floats, each piece rounded up to 64 bytes.
  Arena& restart(int64_t count) {
    if (count + kSlack > capacity_) {
      capacity_ = count + kSlack;
      floats_.reset(static_cast<float*>(std::aligned_alloc(64, (capacity_ * sizeof(float) + 63) / 64 * 64)));
    }
    used_ = 0;
    return *this;
  }

  template <class T>
  T* take(int64_t count) {
    float* piece = floats_.get() + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
    return reinterpret_cast<T*>(piece);
  }

 private:
  static constexpr int64_t kSlack = 1024;
  struct Free {
    void operator()(float* floats) const { std::free(floats); }
  };
  std::unique_ptr<float, Free> floats_;
  int64_t capacity_ = 0, used_ = 0;
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

// Turns the first `rotary` dimensions: x1 cos - x2 sin, x2 cos + x1 sin. cosine and sine: [rotary / 2] of the position.
inline void rotate(float* x, int64_t rotary, const float* cosine, const float* sine) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosine[i] - b * sine[i];
    x[half + i] = b * cosine[i] + a * sine[i];
  }
}

// Norms and rotates queries and keys of qkv[rows, width] in place, and puts keys and values into the cache:
// keys [blocks][heads][size][kBlock], values [blocks][heads][kBlock][size].
template <class T>
void remember(float* qkv, const Step& step, const Heads& heads, const Norm& query_norm, const Norm& key_norm,
              const float* rotation, int64_t rotary, T* keys, T* values) {
  const int64_t plane = heads.size * kBlock;
  // A block's first token clears the block: what a longer sequence left there must not reach sums, not even times 0.
  for (int64_t c = 0; c < step.chunks; ++c)
    for (int64_t r = step.first[c]; r < step.first[c + 1]; ++r)
      if (step.positions[r] % kBlock == 0) {
        const int64_t offset = step.block(c, step.positions[r]) * heads.key * plane;
        std::fill_n(keys + offset, heads.key * plane, T(0));
        std::fill_n(values + offset, heads.key * plane, T(0));
      }
  std::vector<int64_t> owner(step.rows);
  for (int64_t c = 0; c < step.chunks; ++c) std::fill(&owner[step.first[c]], &owner[0] + step.first[c + 1], c);
  at::parallel_for(0, step.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = qkv + r * heads.width();
      const int64_t position = step.positions[r], slot = position % kBlock;
      const int64_t block = step.block(owner[r], position);
      const float* turn = rotation + position * rotary;
      for (int64_t h = 0; h < heads.query + heads.key; ++h) {
        float* head = row + h * heads.size;
        const Norm& how = h < heads.query ? query_norm : key_norm;
        if (how.weight != nullptr) norm_row(head, heads.size, how.weight, how.bias, how.eps, how.centred, head, false);
        if (rotary > 0) rotate(head, rotary, turn, turn + rotary / 2);
      }
      for (int64_t h = 0; h < heads.key; ++h) {
        const float* key = row + (heads.query + h) * heads.size;
        const float* value = key + heads.key * heads.size;
        T* to_keys = keys + (block * heads.key + h) * plane + slot;
        T* to_values = values + (block * heads.key + h) * plane + slot * heads.size;
        for (int64_t i = 0; i < heads.size; ++i) {
          to_keys[i * kBlock] = static_cast<T>(key[i]);
          to_values[i] = static_cast<T>(value[i]);
        }
      }
    }
  });
}

inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load(const BFloat16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

constexpr __mmask16 kAll = 0xFFFF;
constexpr int64_t kLines = 4;  // queries that a read of keys or values serves

// scores[L][kBlock] = queries[L][size] · keys[size][kBlock], each sum from the first dimension to the last.
template <int L, class T>
void score_block(const float* queries, const T* keys, int64_t size, float* scores) {
  __m512 sums[L][2];
  for (int l = 0; l < L; ++l) sums[l][0] = sums[l][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; ++i) {
    const __m512 left = load(keys + i * kBlock, kAll), right = load(keys + i * kBlock + 16, kAll);
    for (int l = 0; l < L; ++l) {
      const __m512 query = _mm512_set1_ps(queries[l * size + i]);
      sums[l][0] = _mm512_fmadd_ps(query, left, sums[l][0]);
      sums[l][1] = _mm512_fmadd_ps(query, right, sums[l][1]);
    }
  }
  for (int l = 0; l < L; ++l) {
    _mm512_storeu_ps(scores + l * kBlock, sums[l][0]);
    _mm512_storeu_ps(scores + l * kBlock + 16, sums[l][1]);
  }
}

// sums[L][size] += weights[L][kBlock] · values[kBlock][size], a block's sum from its first key to its last.
template <int L, class T>
void mix_block(const float* weights, const T* values, int64_t size, float* sums) {
  for (int64_t i = 0; i < size; i += 32) {
    const auto mask = [&](int64_t from) {
      const int64_t left = std::min<int64_t>(16, std::max<int64_t>(0, size - from));
      return static_cast<__mmask16>((1u << left) - 1);
    };
    const __mmask16 first = mask(i), second = mask(i + 16);
    __m512 mixed[L][2];
    for (int l = 0; l < L; ++l) mixed[l][0] = mixed[l][1] = _mm512_setzero_ps();
    for (int64_t j = 0; j < kBlock; ++j) {
      const __m512 left = load(values + j * size + i, first), right = load(values + j * size + i + 16, second);
      for (int l = 0; l < L; ++l) {
        const __m512 weight = _mm512_set1_ps(weights[l * kBlock + j]);
        mixed[l][0] = _mm512_fmadd_ps(weight, left, mixed[l][0]);
        mixed[l][1] = _mm512_fmadd_ps(weight, right, mixed[l][1]);
      }
    }
    for (int l = 0; l < L; ++l) {
      float* to = sums + l * size + i;
      _mm512_mask_storeu_ps(to, first, _mm512_add_ps(_mm512_maskz_loadu_ps(first, to), mixed[l][0]));
      _mm512_mask_storeu_ps(to + 16, second, _mm512_add_ps(_mm512_maskz_loadu_ps(second, to + 16), mixed[l][1]));
    }
  }
}

// f<L>(line) for groups of at most kLines lines.
template <class F>
void each_group(int64_t lines, F f) {
  int64_t line = 0;
  for (; line + kLines <= lines; line += kLines) f(std::integral_constant<int, kLines>{}, line);
  switch (lines - line) {
    case 3: f(std::integral_constant<int, 3>{}, line); break;
    case 2: f(std::integral_constant<int, 2>{}, line); break;
    case 1: f(std::integral_constant<int, 1>{}, line); break;
  }
}

// Calls for memory before it is read: a block is a few pages, and the processor's own prefetching ends with a page.
inline void call_for(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(from) + i, _MM_HINT_T0);
}

struct Look {
  int64_t window;       // keys that a query sees, itself included; 0: all before it
  const float* slopes;  // ALiBi, per query head; none: nullptr
  float scale;
};

// Queries of one tile against all their keys, for one head of keys. Softmax block by block (arXiv:2205.14135).
template <class T>
void attend_tile(const float* qkv, const Step& step, int64_t chunk, int64_t row, int64_t count, int64_t head,
                 const Heads& heads, const Look& look, const T* keys, const T* values, T* out, float* room) {
  const int64_t group = heads.group(), size = heads.size, lines = count * group, plane = size * kBlock;
  float* queries = room;                     // [lines][size]
  float* sums = queries + lines * size;      // [lines][size]
  float* scores = sums + lines * size;       // [lines][kBlock]
  float* largest = scores + lines * kBlock;  // [lines]
  float* totals = largest + lines;           // [lines]
  for (int64_t l = 0; l < lines; ++l) {
    const float* query = qkv + (row + l / group) * heads.width() + (head * group + l % group) * size;
    for (int64_t i = 0; i < size; ++i) queries[l * size + i] = query[i] * look.scale;
    largest[l] = kMasked;
    totals[l] = 0.0f;
  }
  std::fill_n(sums, lines * size, 0.0f);
  const int64_t first = step.positions[row], last = first + count - 1;
  const int64_t start = look.window > 0 ? std::max<int64_t>(0, first - look.window + 1) / kBlock : 0;
  for (int64_t b = start; b <= last / kBlock; ++b) {
    const int64_t offset = (step.block(chunk, b * kBlock) * heads.key + head) * plane;
    if (b < last / kBlock) {
      const int64_t next = (step.block(chunk, (b + 1) * kBlock) * heads.key + head) * plane;
      call_for(keys + next, plane * sizeof(T));
      call_for(values + next, plane * sizeof(T));
    }
    each_group(lines, [&](auto count, int64_t l) {
      score_block<count.value>(queries + l * size, keys + offset, size, scores + l * kBlock);
    });
    for (int64_t l = 0; l < lines; ++l) {
      float* line = scores + l * kBlock;
      const int64_t position = first + l / group;
      const int64_t end = std::min(kBlock, position - b * kBlock + 1);  // keys of this block that are not ahead
      const int64_t begin = look.window > 0 ? std::max<int64_t>(0, position - look.window + 1 - b * kBlock) : 0;
      if (look.slopes != nullptr)
        for (int64_t i = 0; i < kBlock; ++i) line[i] += look.slopes[head * group + l % group] * (b * kBlock + i);
      for (int64_t i = 0; i < std::min(begin, kBlock); ++i) line[i] = kMasked;
      for (int64_t i = std::max<int64_t>(end, 0); i < kBlock; ++i) line[i] = kMasked;
      Vec top(kMasked);
      for (int64_t i = 0; i < kBlock; i += Vec::size()) top = at::vec::maximum(top, Vec::loadu(line + i));
      const float peak = at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, top);
      if (peak == kMasked) {  // nothing of this block is seen
        std::fill_n(line, kBlock, 0.0f);
        continue;
      }
      const float now = std::max(largest[l], peak);
      Vec total(0.0f);
      for (int64_t i = 0; i < kBlock; i += Vec::size()) {
        const Vec weight = (Vec::loadu(line + i) - Vec(now)).exp();
        weight.store(line + i);
        total = total + weight;
      }
      if (now != largest[l]) {
        const float fade = std::exp(largest[l] - now);
        totals[l] *= fade;
        for (int64_t i = 0; i < size; ++i) sums[l * size + i] *= fade;
        largest[l] = now;
      }
      totals[l] += sum(total);
    }
    each_group(lines, [&](auto count, int64_t l) {
      mix_block<count.value>(scores + l * kBlock, values + offset, size, sums + l * size);
    });
  }
  for (int64_t l = 0; l < lines; ++l) {
    T* to = out + ((row + l / group) * heads.query + head * group + l % group) * size;
    const float scale = 1.0f / totals[l];
    for (int64_t i = 0; i < size; ++i) to[i] = static_cast<T>(sums[l * size + i] * scale);
  }
}

struct Tile {
  int64_t chunk, row, count, head;
};

template <class T>
void attend(const float* qkv, const Step& step, const Heads& heads, const Look& look, const T* keys, const T* values,
            T* out) {
  std::vector<Tile> tiles;
  for (int64_t c = step.chunks - 1; c >= 0; --c)
    for (int64_t row = step.first[c]; row < step.first[c + 1]; row += kTile)
      for (int64_t head = 0; head < heads.key; ++head)
        tiles.push_back({c, row, std::min(kTile, step.first[c + 1] - row), head});
  std::atomic<size_t> next{0};
  const int64_t lines = kTile * heads.group();
  const int64_t room = lines * (2 * heads.size + kBlock + 2);
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    static thread_local Arena arena;
    float* scratch = arena.restart(room).take<float>(room);
    for (size_t i = next++; i < tiles.size(); i = next++) {
      const Tile& t = tiles[i];
      attend_tile(qkv, step, t.chunk, t.row, t.count, t.head, heads, look, keys, values, out, scratch);
    }
  });
}

// ---- the layer

const float* optional(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<float>(*tensor) : nullptr;
}

// Places of a layer's tensors in its list; absent ones are empty.
enum Part : int64_t {
  kInputNorm, kInputNormBias, kQkv, kQkvBias, kQueryNorm, kKeyNorm, kOut, kOutBias, kAfterAttention,
  kMlpNorm, kMlpNormBias, kUp, kUpBias, kDown, kDownBias, kAfterMlp, kRotation, kSlopes, kParts
};
// Places of a layer's whole numbers.
enum Number : int64_t {
  kQueryHeads, kKeyHeads, kHeadSize, kRotary, kWindow, kActivation, kGated, kCentred, kParallel, kInner, kNumbers
};

template <class T>
void layer(float* residual, int64_t hidden, const Step& step, at::ArrayRef<std::optional<Tensor>> parts,
           at::IntArrayRef numbers, float eps, float scale, T* keys, T* values) {
  const Heads heads{numbers[kQueryHeads], numbers[kKeyHeads], numbers[kHeadSize]};
  const bool centred = numbers[kCentred] != 0, gated = numbers[kGated] != 0, parallel = numbers[kParallel] != 0;
  const int64_t rows = step.rows, inner = numbers[kInner], rotary = numbers[kRotary];
  const auto at_norm = [&](Part weight, Part bias) {
    return Norm{optional(parts[weight]), bias == kParts ? nullptr : optional(parts[bias]), eps, centred};
  };
  const auto head_norm = [&](Part weight) { return Norm{optional(parts[weight]), nullptr, eps, false}; };
  const auto times = [&](const T* x, int64_t width, Part weight, Part bias, int64_t outputs, float* out, bool add) {
    product(x, rows, width, *parts[weight], optional(parts[bias]), outputs, out, add);
  };

  const int64_t wide = inner * (gated ? 2 : 1), mixed_width = heads.query * heads.size;
  static thread_local Arena arena;
  arena.restart(rows * (3 * hidden + mixed_width + inner + heads.width() + wide));
  T* normed = arena.take<T>(rows * hidden);
  T* mlp_normed = arena.take<T>(rows * hidden);
  T* mixed = arena.take<T>(rows * mixed_width);
  T* active = arena.take<T>(rows * inner);
  float* qkv = arena.take<float>(rows * heads.width());
  float* raised = arena.take<float>(rows * wide);
  float* after = arena.take<float>(rows * hidden);

  norm(residual, rows, hidden, at_norm(kInputNorm, kInputNormBias), normed);
  if (parallel) norm(residual, rows, hidden, at_norm(kMlpNorm, kMlpNormBias), mlp_normed);

  times(normed, hidden, kQkv, kQkvBias, heads.width(), qkv, false);
  remember(qkv, step, heads, head_norm(kQueryNorm), head_norm(kKeyNorm), optional(parts[kRotation]), rotary, keys,
           values);
  attend(qkv, step, heads, Look{numbers[kWindow], optional(parts[kSlopes]), scale}, keys, values, mixed);
  const auto add_to_residual = [&](const T* x, int64_t width, Part weight, Part bias, Part norm_after) {
    if (parts[norm_after]) {
      times(x, width, weight, bias, hidden, after, false);
      norm(after, rows, hidden, at_norm(norm_after, kParts), residual, true);
    } else {
      times(x, width, weight, bias, hidden, residual, true);
    }
  };
  add_to_residual(mixed, mixed_width, kOut, kOutBias, kAfterAttention);

  if (!parallel) norm(residual, rows, hidden, at_norm(kMlpNorm, kMlpNormBias), normed);
  times(parallel ? mlp_normed : normed, hidden, kUp, kUpBias, wide, raised, false);
  activate(raised, rows, inner, numbers[kActivation], gated, active);
  add_to_residual(active, inner, kDown, kDownBias, kAfterMlp);
}

// One layer, in place on residual [rows, hidden] float32. keys and values: the layer's part of the cache.
void decoder_layer(const Tensor& residual, const Tensor& positions, const Tensor& first, const Tensor& tables,
                   const c10::List<std::optional<Tensor>>& parts, at::IntArrayRef numbers, double eps, double scale,
                   const Tensor& keys, const Tensor& values) {
  TORCH_CHECK(parts.size() == kParts && numbers.size() == kNumbers, "a layer's description is incomplete");
  const Step step{positions.numel(), data<int64_t>(positions), first.numel() - 1, data<int64_t>(first),
                  data<int64_t>(tables), tables.size(1)};
  const std::vector<std::optional<Tensor>> owned = parts.vec();
  if (keys.scalar_type() == at::kBFloat16)
    layer<BFloat16>(data<float>(residual), residual.size(1), step, owned, numbers, eps, scale, data<BFloat16>(keys),
                    data<BFloat16>(values));
  else
    layer<float>(data<float>(residual), residual.size(1), step, owned, numbers, eps, scale, data<float>(keys),
                 data<float>(values));
}

// Logits [rows, outputs] float32 of a packed head; x [rows, in] of its type.
void head(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const Tensor& out) {
  if (packed.scalar_type() == at::kBFloat16)
    product(data<BFloat16>(x), x.size(0), x.size(1), packed, optional(bias), out.size(1), data<float>(out), false);
  else
    product(data<float>(x), x.size(0), x.size(1), packed, optional(bias), out.size(1), data<float>(out), false);
}

// The final norm: out [rows, hidden], float32 or bfloat16.
void final_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps, bool centred,
                const Tensor& out) {
  const Norm how{data<float>(weight), optional(bias), static_cast<float>(eps), centred};
  if (out.scalar_type() == at::kBFloat16)
    norm(data<float>(x), x.size(0), x.size(1), how, data<BFloat16>(out));
  else
    norm(data<float>(x), x.size(0), x.size(1), how, data<float>(out));
}

// ---- rows of logits

// A row of logits is read in chunks of this many columns, each by one thread; what they give is put together in order.
constexpr int64_t kChunk = 8192;

struct Candidate {
  float value;
  int64_t id;
  bool operator<(const Candidate& other) const { return value > other.value || (value == other.value && id < other.id); }
};

// Puts the `count` best of row[begin … end) into `best`, by value, then by lower id.
void best_of_chunk(const float* row, int64_t begin, int64_t end, int64_t count, std::vector<Candidate>& best) {
  best.clear();
  float least = kMasked;
  for (int64_t i = begin; i < end; i += Vec::size()) {
    const int64_t n = std::min<int64_t>(Vec::size(), end - i);
    if (static_cast<int64_t>(best.size()) == count) {
      Vec top = Vec::loadu(row + i, n);
      if (n < Vec::size()) top = Vec::set(Vec(kMasked), top, n);
      if (!(at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, top) > least)) continue;
    }
    for (int64_t j = i; j < i + n; ++j) {
      if (static_cast<int64_t>(best.size()) == count && !(row[j] > least)) continue;
      const Candidate candidate{row[j], j};
      best.insert(std::upper_bound(best.begin(), best.end(), candidate), candidate);
      if (static_cast<int64_t>(best.size()) > count) best.pop_back();
      least = best.back().value;
    }
  }
}

// Sums of exp(x - largest) over row[begin … end) in double, and of that times (x - largest).
void sums_of_chunk(const float* row, int64_t begin, int64_t end, float largest, bool moments, double* total, double* moment) {
  double first = 0.0;
  alignas(64) float weights[Vec::size()];
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  for (int64_t i = begin; i < end; i += Vec::size()) {
    const int64_t n = std::min<int64_t>(Vec::size(), end - i);
    Vec x = Vec::loadu(row + i, n);
    if (n < Vec::size()) x = Vec::set(Vec(kMasked), x, n);
    const Vec weight = (x - Vec(largest)).exp();
    const __m512 plain = weight;
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(plain)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(plain, 1)));
    if (moments) {
      weight.store(weights);
      for (int64_t j = 0; j < n; ++j)
        if (weights[j] > 0) first += static_cast<double>(weights[j]) * (row[i + j] - largest);
    }
  }
  *total = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  *moment = first;
}

template <class F>
void each_chunk(int64_t rows, int64_t chunks, F f) {
  at::parallel_for(0, rows * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / chunks, i % chunks, i);
  });
}

// What is told of each row of logits [rows, vocab]: floats [rows, 5] double: log-sum-exp, log of the mass outside the
// top, entropy (if asked for), the chosen token's logit, 1 if the row holds a NaN or +inf or nothing else than -inf;
// counts [rows, 2]: rank of the chosen token, id of the largest logit; top values and ids [rows, most], counts[r] of
// them wanted. Logits are left as they were.
void row_statistics(const Tensor& logits, const Tensor& chosen, const Tensor& wanted, const Tensor& entropies,
                    const Tensor& floats, const Tensor& counts, const Tensor& values, const Tensor& ids) {
  const int64_t rows = logits.size(0), vocab = logits.size(1), most = values.size(1), stride = logits.stride(0);
  const int64_t chunks = (vocab + kChunk - 1) / kChunk;
  float* all = data<float>(logits);
  const int64_t* token = data<int64_t>(chosen);
  const int64_t* tops = data<int64_t>(wanted);
  const bool* moments = data<bool>(entropies);
  double* out = data<double>(floats);
  int64_t* numbers = data<int64_t>(counts);
  std::vector<std::vector<Candidate>> best(rows * chunks);
  std::vector<int64_t> greater(rows * chunks, 0);
  std::vector<char> odd(rows * chunks, 0);
  each_chunk(rows, chunks, [&](int64_t r, int64_t c, int64_t i) {
    const float* row = all + r * stride;
    const int64_t begin = c * kChunk, end = std::min(vocab, begin + kChunk);
    const float limit = row[token[r]];
    int64_t count = 0, strange = 0;
    for (int64_t j = begin; j < end; ++j) {
      count += row[j] > limit;
      strange += !(row[j] <= std::numeric_limits<float>::max());
    }
    greater[i] = count;
    odd[i] = strange > 0;
    if (strange == 0) best_of_chunk(row, begin, end, std::max<int64_t>(1, tops[r]), best[i]);
  });
  std::vector<Candidate> merged;
  std::vector<float> largest(rows, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    merged.clear();
    int64_t rank = 1;
    bool bad = false;
    for (int64_t i = r * chunks; i < (r + 1) * chunks; ++i) {
      merged.insert(merged.end(), best[i].begin(), best[i].end());
      rank += greater[i];
      bad = bad || odd[i];
    }
    std::sort(merged.begin(), merged.end());
    bad = bad || merged.empty() || merged[0].value == kMasked;
    out[r * 5 + 4] = bad ? 1.0 : 0.0;
    out[r * 5 + 3] = all[r * stride + token[r]];
    numbers[r * 2] = rank;
    numbers[r * 2 + 1] = bad ? 0 : merged[0].id;
    if (bad) continue;
    largest[r] = merged[0].value;
    for (int64_t k = 0; k < tops[r]; ++k) {
      data<float>(values)[r * most + k] = merged[k].value;
      data<int64_t>(ids)[r * most + k] = merged[k].id;
      all[r * stride + merged[k].id] = kMasked;  // so that the sums below are of what is outside the top
    }
  }
  std::vector<double> totals(rows * chunks), firsts(rows * chunks);
  each_chunk(rows, chunks, [&](int64_t r, int64_t c, int64_t i) {
    const int64_t begin = c * kChunk, end = std::min(vocab, begin + kChunk);
    if (out[r * 5 + 4] == 0.0) sums_of_chunk(all + r * stride, begin, end, largest[r], moments[r], &totals[i], &firsts[i]);
  });
  for (int64_t r = 0; r < rows; ++r) {
    if (out[r * 5 + 4] != 0.0) continue;
    double tail = 0.0, moment = 0.0, top = 0.0;
    for (int64_t i = r * chunks; i < (r + 1) * chunks; ++i) {
      tail += totals[i];
      moment += firsts[i];
    }
    for (int64_t k = 0; k < tops[r]; ++k) {
      const float value = data<float>(values)[r * most + k];
      const double weight = std::exp(static_cast<double>(value - largest[r]));
      top += weight;
      if (weight > 0) moment += weight * (value - largest[r]);
      all[r * stride + data<int64_t>(ids)[r * most + k]] = value;
    }
    const double total = top + tail;
    out[r * 5] = largest[r] + std::log(total);
    out[r * 5 + 1] = std::log(tail / total);
    out[r * 5 + 2] = std::log(total) - moment / total;
  }
}

// An Exponential(1) variable's logarithm for 16 tokens, as VocabularyNoise in random.py makes it.
inline Vec log_exponentials(__m512i ids, int32_t first, int32_t second) {
  __m512i bits = _mm512_add_epi32(_mm512_mullo_epi32(ids, _mm512_set1_epi32(static_cast<int32_t>(0x9E3779B1u))),
                                  _mm512_set1_epi32(first));
  bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
  bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32(static_cast<int32_t>(0x85EBCA6Bu)));
  bits = _mm512_xor_si512(bits, _mm512_set1_epi32(second));
  bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 13));
  bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32(static_cast<int32_t>(0xC2B2AE35u)));
  bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
  bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const Vec uniform = (Vec(_mm512_cvtepi32_ps(bits)) + Vec(0.5f)) * Vec(0x1p-31f);
  return at::vec::minimum(uniform, Vec(1.0f - 0x1p-24f)).neg().log1p().neg().log();
}

// Draws one token of each row of logits [rows, vocab], none truncated, by an exponential race: winners [rows], their
// logprobs under the scaled distribution [rows] double, and how many tokens could be drawn [rows].
// temperatures [rows] float32, keys [rows, 2] int32.
void race(const Tensor& logits, const Tensor& temperatures, const Tensor& keys, const Tensor& winners,
          const Tensor& logprobs, const Tensor& sizes) {
  const int64_t rows = logits.size(0), vocab = logits.size(1), chunks = (vocab + kChunk - 1) / kChunk;
  const float* all = data<float>(logits);
  const float* temperature = data<float>(temperatures);
  const int32_t* key = data<int32_t>(keys);
  std::vector<float> peaks(rows * chunks);
  each_chunk(rows, chunks, [&](int64_t r, int64_t c, int64_t i) {
    const float* row = all + r * vocab;
    peaks[i] = *std::max_element(row + c * kChunk, row + std::min(vocab, (c + 1) * kChunk));
  });
  struct Leg {
    float best = kMasked;
    int64_t id = 0, size = 0;
    double total = 0.0;
  };
  std::vector<Leg> legs(rows * chunks);
  each_chunk(rows, chunks, [&](int64_t r, int64_t c, int64_t i) {
    const float* row = all + r * vocab;
    const float largest = *std::max_element(&peaks[r * chunks], &peaks[0] + (r + 1) * chunks);
    const int64_t begin = c * kChunk, end = std::min(vocab, begin + kChunk);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    alignas(64) float scores[Vec::size()];
    Leg& leg = legs[i];
    for (int64_t j = begin; j < end; j += Vec::size()) {
      const int64_t n = std::min<int64_t>(Vec::size(), end - j);
      Vec x = Vec::loadu(row + j, n);
      if (n < Vec::size()) x = Vec::set(Vec(kMasked), x, n);
      x = (x - Vec(largest)) / Vec(temperature[r]);
      const __m512i ids = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(j)), lanes);
      const Vec score = x - log_exponentials(ids, key[2 * r], key[2 * r + 1]);
      const __m512 weight = x.exp();
      leg.total += _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(weight)),
                                                      _mm512_cvtps_pd(_mm512_extractf32x8_ps(weight, 1))));
      leg.size += __builtin_popcount(_mm512_cmp_ps_mask(x, _mm512_set1_ps(kMasked), _CMP_GT_OQ));
      if (_mm512_cmp_ps_mask(score, _mm512_set1_ps(leg.best), _CMP_GT_OQ) == 0) continue;
      score.store(scores);
      for (int64_t l = 0; l < n; ++l)
        if (scores[l] > leg.best) {
          leg.best = scores[l];
          leg.id = j + l;
        }
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    Leg whole;
    for (int64_t i = r * chunks; i < (r + 1) * chunks; ++i) {
      whole.total += legs[i].total;
      whole.size += legs[i].size;
      if (legs[i].best > whole.best) {
        whole.best = legs[i].best;
        whole.id = legs[i].id;
      }
    }
    const float largest = *std::max_element(&peaks[r * chunks], &peaks[0] + (r + 1) * chunks);
    const float scaled = (all[r * vocab + whole.id] - largest) / temperature[r];
    data<int64_t>(winners)[r] = whole.id;
    data<double>(logprobs)[r] = scaled - std::log(whole.total);
    data<int64_t>(sizes)[r] = whole.size;
  }
}

}  // namespace

TORCH_LIBRARY(logprobs, m) {
  m.def("pack(Tensor weight) -> Tensor", pack);
  m.def(
      "decoder_layer(Tensor(a!) residual, Tensor positions, Tensor first, Tensor tables, Tensor?[] parts, int[] numbers, "
      "float eps, float scale, Tensor(b!) keys, Tensor(c!) values) -> ()",
      decoder_layer);
  m.def("head(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) out) -> ()", head);
  m.def(
      "row_statistics(Tensor logits, Tensor chosen, Tensor wanted, Tensor entropies, Tensor(a!) floats, "
      "Tensor(b!) counts, Tensor(c!) values, Tensor(d!) ids) -> ()",
      row_statistics);
  m.def(
      "race(Tensor logits, Tensor temperatures, Tensor keys, Tensor(a!) winners, Tensor(b!) logprobs, Tensor(c!) sizes) "
      "-> ()",
      race);
  m.def("final_norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred, Tensor(a!) out) -> ()", final_norm);
}
