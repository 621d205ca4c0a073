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

#include <atomic>
#include <cmath>
#include <limits>
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

// A block of keys or values as float32.
inline const float* plain(const float* from, int64_t, float*) { return from; }
inline const float* plain(const BFloat16* from, int64_t count, float* room) {
  at::vec::convert(from, room, count);
  return room;
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
  float* key_room = scores + lines * kBlock;  // [size][kBlock]
  float* value_room = key_room + plane;       // [kBlock][size]
  float* largest = value_room + plane;        // [lines]
  float* totals = largest + lines;            // [lines]
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
    at::native::cpublas::brgemm(lines, kBlock, size, size, kBlock, kBlock, false, queries,
                                plain(keys + offset, plane, key_room), scores, false);
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
    at::native::cpublas::brgemm(lines, size, kBlock, kBlock, size, size, true, scores,
                                plain(values + offset, plane, value_room), sums, false);
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
  const int64_t room = lines * (2 * heads.size + kBlock + 2) + 2 * heads.size * kBlock;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    std::vector<float> scratch(room);
    for (size_t i = next++; i < tiles.size(); i = next++) {
      const Tile& t = tiles[i];
      attend_tile(qkv, step, t.chunk, t.row, t.count, t.head, heads, look, keys, values, out, scratch.data());
    }
    at::native::cpublas::brgemm_release(false);
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

  std::vector<T> normed(rows * hidden), mlp_normed(parallel ? rows * hidden : 0);
  std::vector<T> mixed(rows * heads.query * heads.size), active(rows * inner);
  std::vector<float> qkv(rows * heads.width()), raised(rows * inner * (gated ? 2 : 1));
  std::vector<float> after(parts[kAfterAttention] || parts[kAfterMlp] ? rows * hidden : 0);

  norm(residual, rows, hidden, at_norm(kInputNorm, kInputNormBias), normed.data());
  if (parallel) norm(residual, rows, hidden, at_norm(kMlpNorm, kMlpNormBias), mlp_normed.data());

  times(normed.data(), hidden, kQkv, kQkvBias, heads.width(), qkv.data(), false);
  remember(qkv.data(), step, heads, head_norm(kQueryNorm), head_norm(kKeyNorm), optional(parts[kRotation]), rotary, keys,
           values);
  attend(qkv.data(), step, heads, Look{numbers[kWindow], optional(parts[kSlopes]), scale}, keys, values, mixed.data());
  const auto add_to_residual = [&](const T* x, int64_t width, Part weight, Part bias, Part norm_after) {
    if (parts[norm_after]) {
      times(x, width, weight, bias, hidden, after.data(), false);
      norm(after.data(), rows, hidden, at_norm(norm_after, kParts), residual, true);
    } else {
      times(x, width, weight, bias, hidden, residual, true);
    }
  };
  add_to_residual(mixed.data(), heads.query * heads.size, kOut, kOutBias, kAfterAttention);

  if (!parallel) norm(residual, rows, hidden, at_norm(kMlpNorm, kMlpNormBias), normed.data());
  times(parallel ? mlp_normed.data() : normed.data(), hidden, kUp, kUpBias, inner * (gated ? 2 : 1), raised.data(), false);
  activate(raised.data(), rows, inner, numbers[kActivation], gated, active.data());
  add_to_residual(active.data(), inner, kDown, kDownBias, kAfterMlp);
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

}  // namespace

TORCH_LIBRARY(logprobs, m) {
  m.def("pack(Tensor weight) -> Tensor", pack);
  m.def(
      "decoder_layer(Tensor(a!) residual, Tensor positions, Tensor first, Tensor tables, Tensor?[] parts, int[] numbers, "
      "float eps, float scale, Tensor(b!) keys, Tensor(c!) values) -> ()",
      decoder_layer);
  m.def("head(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) out) -> ()", head);
  m.def("final_norm(Tensor x, Tensor weight, Tensor? bias, float eps, bool centred, Tensor(a!) out) -> ()", final_norm);
}
