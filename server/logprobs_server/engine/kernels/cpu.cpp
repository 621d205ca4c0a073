// The CPU's kernels as torch sees them: a decoder with packed weights and a cache of keys and values, and what is told
// of logits. Residual stream, norms, softmax, activations and sums are float32; products take bfloat16 or float32,
// those of attention float32 or whole numbers (attention.h). Where the processor does not multiply bfloat16, a bfloat16
// model's weights meet float32.
// Every row's bits depend on that row and what precedes it in its sequence alone: see product.h and attention.h.
// Knows nothing of requests or schedules. Shapes are the business of the Python side, which owns the tensors.

#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <variant>

#include "attention.h"
#include "logits.h"
#include "product.h"
#include "rows.h"
#include "threads.h"

namespace logprobs {
namespace {

// Places of a layer's tensors in its list, and of those outside the layers; absent ones are None. See lean.py.
enum Place : int64_t {
  kInputNorm, kInputNormBias, kQkv, kQkvBias, kQueryNorm, kKeyNorm, kOut, kOutBias, kAfterAttention,
  kMlpNorm, kMlpNormBias, kUp, kUpBias, kDown, kDownBias, kAfterMlp, kRotation, kParts
};
enum End : int64_t {
  kFinalNorm, kFinalNormBias, kEmbedding, kPositions, kEmbeddingNorm, kEmbeddingNormBias, kSlopes, kHead, kHeadBias
};

constexpr int64_t kFew = 32;          // rows that a thread norms sooner than it waits for the others
constexpr int64_t kMany = 8;          // rows of more that a thread takes at once: to take some waits for all it has stored
constexpr int64_t kCached = 1 << 20;  // logits that the caches hold until they are reduced

// What all layers share, whole numbers first. Fields in the order of lean.py.
struct Shape {
  int64_t hidden, inner, vocab, activation;
  bool gated, centred, parallel;
  Heads heads;
  float eps, scale, embedding_scale;
};

// Room of one pass, kept for the next.
class Room {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (taken_ == pieces_.size()) pieces_.emplace_back();
    Arena& piece = pieces_[taken_++];
    return reinterpret_cast<T*>(piece.floats(bytes / sizeof(float)));
  }
  void restart() { taken_ = 0; }

 private:
  std::vector<Arena> pieces_;
  size_t taken_ = 0;
};

// One layer's weights.
template <class T>
struct Weights {
  Norm input_norm, mlp_norm, after_attention, after_mlp;
  Packed<T> qkv, out, up, down;
  Look look;
};

// Tables of rows, one for a token, one for a position if those are learned, and the norm behind them if there is one.
template <class T>
struct Embedding {
  const T *tokens, *positions;
  Norm norm;
};

// A decoder whose products take T and whose keys and values are kept as C.
template <class T, class C>
class Layers {
 public:
  Layers(const Shape& shape, std::vector<Weights<T>> layers, Embedding<T> embedding, Norm final_norm, Packed<T> head,
         C* cache)
      : shape_(shape), layers_(std::move(layers)), embedding_(embedding), final_norm_(final_norm), head_(head),
        cache_(cache) {}

  // residual [rows, hidden] behind the last layer, of tokens [rows].
  void forward(const int64_t* tokens, const Step& step, float* residual) {
    const Tiles cuts = cut(step, shape_.heads);
    room_.restart();
    const int64_t rows = step.rows, mixed = shape_.heads.query * shape_.heads.size;
    Buffers b{inputs(rows, shape_.hidden), inputs(rows, shape_.hidden), inputs(rows, mixed), inputs(rows, shape_.inner),
              room_.take<float>(rows * shape_.heads.width()), room_.take<float>(rows * shape_.hidden)};
    Team& team = Team::get();
    team.run([&] {
      const Flushing flushing;
      each_row(team, step.rows, [&](int64_t r) { embed(tokens[r], step.positions[r], residual + r * shape_.hidden); });
      for (size_t l = 0; l < layers_.size(); ++l) layer(team, residual, step, cuts, l, b);
    });
  }

  // out [rows, vocab], at the start of a cache line, of hidden [rows, hidden].
  void logits(const float* hidden, int64_t rows, float* out) {
    room_.restart();
    const Inputs<X> normed = inputs(rows, shape_.hidden);
    Team& team = Team::get();
    team.run([&] {
      each_row(team, rows, [&](int64_t r) { norm(hidden, r, final_norm_, normed); });
      if (shape_.vocab % kLanes == 0 && rows * shape_.vocab > kCached)
        product(team, normed, rows, head_, stream(out, shape_.vocab));
      else
        product(team, normed, rows, head_, Put{out, shape_.vocab});
      _mm_sfence();
    });
  }

 private:
  using X = Input<T>;

  struct Buffers {
    Inputs<X> normed, mlp_normed, mixed, active;
    float *qkv, *after;
  };

  // Room for what a product takes; tiled if all its vectors of 16, those of each head among them, stay whole.
  Inputs<X> inputs(int64_t rows, int64_t width) {
    const bool whole = width % kTileInputs == 0 && shape_.heads.size % kLanes == 0;
    const bool tiled = std::is_same_v<X, BFloat16> && on_tiles() && rows > kFew && whole;
    return {room_.take<X>((rows + kSide - 1) / kSide * kSide * width), width, tiled};
  }

  // A section: f(row) for each of `rows`.
  template <class F>
  static void each_row(Team& team, int64_t rows, F f) {
    const int64_t many = rows > kFew ? kMany : 1;
    team.each((rows + many - 1) / many, [&](int64_t part) {
      for (int64_t r = part * many; r < std::min(rows, (part + 1) * many); ++r) f(r);
    });
  }

  void embed(int64_t token, int64_t position, float* row) const {
    const Floats scale = spread(shape_.embedding_scale);
    each_vector(shape_.hidden, [&](int64_t i, Mask lanes) {
      Floats value = mul(load(embedding_.tokens + token * shape_.hidden + i, lanes), scale);
      if (embedding_.positions != nullptr)
        value = add(value, load(embedding_.positions + position * shape_.hidden + i, lanes));
      store(row + i, value, lanes);
    });
    if (embedding_.norm.weight != nullptr) norm_row(row, shape_.hidden, embedding_.norm, row);
  }

  // Row r of out = norm(x).
  void norm(const float* x, int64_t r, const Norm& how, const Inputs<X>& out) const {
    norm_row_to(x + r * shape_.hidden, shape_.hidden, how, [&](int64_t i) { return out.at(r, i); });
  }

  // norm(x) of all rows: of few by the member that calls, in its own memory, for the section that follows alone, since to
  // wait for the others takes longer; of many by the team, in `shared`, as where another section reads it too.
  Inputs<X> normed(Team& team, const float* x, int64_t rows, const Norm& how, const Inputs<X>& shared, Arena& own) {
    if (rows > kFew || shape_.parallel) {
      each_row(team, rows, [&](int64_t r) { norm(x, r, how, shared); });
      return shared;
    }
    const Inputs<X> out{reinterpret_cast<X*>(own.floats(rows * shape_.hidden)), shape_.hidden};
    for (int64_t r = 0; r < rows; ++r) norm(x, r, how, out);
    return out;
  }

  // Puts a product's sums into out[rows, width].
  struct Put {
    float* out;
    int64_t width;

    void operator()(int64_t row, int64_t block, Floats left, Floats right) const {
      float* to = out + row * width + block * kColumns;
      const int64_t rest = width - block * kColumns;
      store(to, left, first_lanes(rest));
      if (rest > kLanes) store(to + kLanes, right, first_lanes(rest - kLanes));
    }
  };

  // Adds a product's sums to out[rows, width].
  struct Add {
    float* out;
    int64_t width;

    // Calls for what the sums will be added to: of many rows, it is in no near cache.
    void expect(int64_t row, int64_t block) const {
      const float* to = out + row * width + block * kColumns;
      _mm_prefetch(to, _MM_HINT_T0);
      _mm_prefetch(to + kLanes, _MM_HINT_T0);
    }

    void operator()(int64_t row, int64_t block, Floats left, Floats right) const {
      const float* from = out + row * width + block * kColumns;
      const int64_t rest = width - block * kColumns;
      const Floats first = load(from, first_lanes(rest)), second = load(from + kLanes, first_lanes(rest - kLanes));
      Put{out, width}(row, block, add(first, left), add(second, right));
    }
  };

  // Puts a product's sums into out[rows, width], a whole number of cache lines, past the caches: to fetch lines only to
  // overwrite them costs a tenth of the product. Whoever does so must fence.
  static auto stream(float* out, int64_t width) {
    return [out, width](int64_t row, int64_t block, Floats left, Floats right) {
      float* to = out + row * width + block * kColumns;
      store_past_caches(to, left);
      if (block * kColumns + kLanes < width) store_past_caches(to + kLanes, right);
    };
  }

  // Puts activation(x) into out [rows, inner]; of a gated product activation(left) · right, 16 of each to a block.
  template <bool kOnlySilu>
  auto activate(const Inputs<X>& out) const {
    return [out, this](int64_t row, int64_t block, Floats left, Floats right) {
      const int64_t inner = shape_.inner;
      const auto activated = [this](Floats x) {
        if constexpr (kOnlySilu)
          return silu<T>(x);
        else
          return gelu_or_relu(x, shape_.activation);
      };
      if (shape_.gated) {
        store(out.at(row, block * kLanes), mul(activated(left), right), first_lanes(inner - block * kLanes));
      } else {
        const int64_t column = block * kColumns;
        store(out.at(row, column), activated(left), first_lanes(inner - column));
        if (inner > column + kLanes)
          store(out.at(row, column + kLanes), activated(right), first_lanes(inner - column - kLanes));
      }
    };
  }

  void layer(Team& team, float* residual, const Step& step, const Tiles& cuts, int64_t index, const Buffers& b) {
    const Weights<T>& w = layers_[index];
    const int64_t rows = step.rows, hidden = shape_.hidden;
    const auto add_to_residual = [&](const Inputs<X>& x, const Packed<T>& by, const Norm& norm_after) {
      if (norm_after.weight != nullptr) {
        product(team, x, rows, by, Put{b.after, hidden});
        each_row(team, rows, [&](int64_t r) {
          norm_row(b.after + r * hidden, hidden, norm_after, residual + r * hidden, true);
        });
      } else {
        product(team, x, rows, by, Add{residual, hidden});
      }
    };
    const auto kept = [&](int64_t of) { return Kept<C>{cache_, static_cast<int64_t>(layers_.size()), of}; };
    static thread_local Arena own, own_second;
    static thread_local std::vector<int64_t> blocks;
    const auto mlp_input = [&] { return normed(team, residual, rows, w.mlp_norm, b.mlp_normed, own_second); };
    const Inputs<X> early = shape_.parallel ? mlp_input() : Inputs<X>{};
    product(team, normed(team, residual, rows, w.input_norm, b.normed, own), rows, w.qkv,
            Put{b.qkv, shape_.heads.width()});
    attend(team, b.qkv, step, cuts, shape_.heads, w.look, kept(index), b.mixed);
    add_to_residual(b.mixed, w.out, w.after_attention);
    Later later;
    if (rows > kRows && index + 1 < static_cast<int64_t>(layers_.size()))
      later = read_by(step, cuts, shape_.heads, layers_[index + 1].look, kept(index + 1), blocks);
    const Inputs<X> input = shape_.parallel ? early : mlp_input();
    if (shape_.activation == kSilu)
      product(team, input, rows, w.up, activate<true>(b.active), later);
    else
      product(team, input, rows, w.up, activate<false>(b.active), later);
    add_to_residual(b.active, w.down, w.after_mlp);
  }

  Shape shape_;
  std::vector<Weights<T>> layers_;
  Embedding<T> embedding_;
  Norm final_norm_;
  Packed<T> head_;
  C* cache_;
  Room room_;
};

// What Python holds: keeps the tensors alive that the layers point into.
class Decoder : public torch::CustomClassHolder {
 public:
  // parts: kParts tensors a layer; ends: see `End`. numbers and scalars: see `Shape`. windows: of each layer.
  // cache: see `Kept`.
  Decoder(const c10::List<std::optional<Tensor>>& parts, const c10::List<std::optional<Tensor>>& ends,
          std::vector<int64_t> numbers, std::vector<double> scalars, std::vector<int64_t> windows, const Tensor& cache)
      : parts_(parts.vec()), ends_(ends.vec()), cache_(cache) {
    const auto n = numbers.begin();
    shape_ = {n[0], n[1], n[2], n[3], n[4] != 0, n[5] != 0, n[6] != 0, {n[7], n[8], n[9]},
              static_cast<float>(scalars[0]), static_cast<float>(scalars[1]), static_cast<float>(scalars[2])};
    if (cache.scalar_type() == at::kFloat)
      fill<float, float>(windows);
    else
      fill<BFloat16, Pair>(windows);
  }

  // Hidden states [rows, hidden] float32 behind the last layer, before the final norm, of the chunks' tokens [rows].
  // Of each chunk: starts, its first token's position; counts, of its tokens; blocks, flat, as many as of every other.
  Tensor forward(const std::vector<int64_t>& tokens, const std::vector<int64_t>& starts,
                 const std::vector<int64_t>& counts, const std::vector<int64_t>& blocks) {
    const int64_t rows = tokens.size(), chunks = starts.size();
    std::vector<int64_t> positions, first{0};
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t i = 0; i < counts[c]; ++i) positions.push_back(starts[c] + i);
      first.push_back(positions.size());
    }
    TORCH_CHECK(rows > 0 && first.back() == rows, "chunks of ", first.back(), " tokens, given ", rows);
    const int64_t width = blocks.size() / chunks;
    const Step step{rows, positions.data(), chunks, first.data(), blocks.data(), width};
    const Tensor residual = at::empty({rows, shape_.hidden}, at::kFloat);
    std::visit([&](auto& layers) { layers->forward(tokens.data(), step, data<float>(residual)); }, layers_);
    return residual;
  }

  // out [rows, vocab] float32 of hidden [rows, hidden] float32, before the final norm.
  void logits(const Tensor& hidden, const Tensor& out) {
    std::visit([&](auto& layers) { layers->logits(data<float>(hidden), hidden.size(0), data<float>(out)); }, layers_);
  }

 private:
  static const float* optional(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? data<float>(*tensor) : nullptr;
  }

  template <class T>
  static Packed<T> packed(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t outputs,
                          int64_t in) {
    return {data<T>(*weight), optional(bias), outputs, in};
  }

  template <class T, class C>
  void fill(const std::vector<int64_t>& windows) {
    const Shape& s = shape_;
    const auto norm = [&](const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
      return Norm{optional(weight), optional(bias), s.eps, s.centred};
    };
    std::vector<Weights<T>> layers;
    for (size_t l = 0; l < windows.size(); ++l) {
      const std::optional<Tensor>* p = &parts_[l * kParts];
      const int64_t rotary = p[kRotation] ? p[kRotation]->size(1) : 0;
      const int64_t raised = s.gated ? (s.inner + kLanes - 1) / kLanes * kColumns : s.inner;
      layers.push_back({norm(p[kInputNorm], p[kInputNormBias]), norm(p[kMlpNorm], p[kMlpNormBias]),
                        norm(p[kAfterAttention], {}), norm(p[kAfterMlp], {}),
                        packed<T>(p[kQkv], p[kQkvBias], s.heads.width(), s.hidden),
                        packed<T>(p[kOut], p[kOutBias], s.hidden, s.heads.query * s.heads.size),
                        packed<T>(p[kUp], p[kUpBias], raised, s.hidden),
                        packed<T>(p[kDown], p[kDownBias], s.hidden, s.inner),
                        Look{optional(p[kQueryNorm]), optional(p[kKeyNorm]), s.eps, optional(p[kRotation]), rotary,
                             windows[l], optional(ends_[kSlopes]), s.scale}});
    }
    const Embedding<T> embedding{data<T>(*ends_[kEmbedding]),
                                 ends_[kPositions] ? data<T>(*ends_[kPositions]) : nullptr,
                                 norm(ends_[kEmbeddingNorm], ends_[kEmbeddingNormBias])};
    layers_ = std::make_unique<Layers<T, C>>(s, std::move(layers), embedding,
                                             norm(ends_[kFinalNorm], ends_[kFinalNormBias]),
                                             packed<T>(ends_[kHead], ends_[kHeadBias], s.vocab, s.hidden), data<C>(cache_));
  }

  std::vector<std::optional<Tensor>> parts_, ends_;
  Tensor cache_;
  Shape shape_;
  std::variant<std::unique_ptr<Layers<float, float>>, std::unique_ptr<Layers<BFloat16, Pair>>> layers_;
};

Tensor huge_pages(at::IntArrayRef shape, at::ScalarType dtype) { return huge(shape, dtype); }

void set_threads(int64_t count) { Team::get().resize(count); }

}  // namespace
}  // namespace logprobs

TORCH_LIBRARY(logprobs, m) {
  using namespace logprobs;
  m.class_<Decoder>("Decoder")
      .def(torch::init<const c10::List<std::optional<Tensor>>&, const c10::List<std::optional<Tensor>>&,
                       std::vector<int64_t>, std::vector<double>, std::vector<int64_t>, const Tensor&>())
      .def("forward", &Decoder::forward)
      .def("logits", &Decoder::logits);
  m.def("set_threads(int count) -> ()", set_threads);
  m.def("on_tiles() -> bool", on_tiles);
  m.def("huge_pages(int[] shape, ScalarType dtype) -> Tensor", huge_pages);
  m.def("pack(Tensor weight, Tensor(a!) packed) -> ()", pack);
  m.def(
      "row_statistics(Tensor logits, int[] chosen, int[] wanted, bool[] entropies) -> (Tensor normalisers, Tensor floats, "
      "Tensor counts, Tensor logprobs, Tensor ids)",
      row_statistics);
  m.def(
      "race(Tensor logits, Tensor temperatures, Tensor keys, Tensor(a!) winners, Tensor(b!) logprobs, Tensor(c!) sizes) "
      "-> ()",
      race);
}
