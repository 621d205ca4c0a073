// Rows of numbers: exponentials, norms, activations, rotation. What a row becomes depends on it alone.
#pragma once

#include <pmmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "lanes.h"

namespace logprobs {

constexpr int64_t kColumns = 32;    // outputs that one block of packed weights gives
constexpr int64_t kCacheLine = 64;  // bytes
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// While it lives, numbers below the normal ones count as 0 to its thread. Each costs 200 cycles on some processors, and the
// weight of every masked key is one on its way to 0. What is told of logits does without: a tail may be as small.
class Flushing {
 public:
  Flushing() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
  ~Flushing() { _mm_setcsr(before_); }
  Flushing(const Flushing&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
};

// e to the power of each lane, at most 1 ulp off up to 88; exactly 0 below -104, -inf included (and as `scale` and `Flushing`
// say). Cody-Waite reduction and Cephes' polynomial for expf.
inline Floats exponential(Floats x) {
  x = max(x, spread(-104.0f));
  const Floats power = rounded(mul(x, spread(kLog2E)));
  Floats r = fnmadd(power, spread(0.693359375f), x);
  r = fnmadd(power, spread(-2.12194440e-4f), r);
  Floats p = spread(1.9875691500e-4f);
  p = fmadd(p, r, spread(1.3981999507e-3f));
  p = fmadd(p, r, spread(8.3334519073e-3f));
  p = fmadd(p, r, spread(4.1665795894e-2f));
  p = fmadd(p, r, spread(1.6666665459e-1f));
  p = fmadd(p, r, spread(5.0000001201e-1f));
  p = fmadd(p, mul(r, r), add(r, spread(1.0f)));
  return scale(p, power);
}

// 2 to the power of each lane, at most 3 ulp off up to 127; exactly 1 at 0, exactly 0 below -151, -inf included (and as
// `scale` and `Flushing` say). 1 plus a polynomial of least relative error on [0, 1), 8.2e-8.
inline Floats power_of_two(Floats x) {
  x = max(x, spread(-152.0f));
  const Floats r = above_floor(x);  // x - floor(x)
  Floats p = spread(1.867130070e-3f);
  p = fmadd(p, r, spread(9.017030322e-3f));
  p = fmadd(p, r, spread(5.579991310e-2f));
  p = fmadd(p, r, spread(2.401644502e-1f));
  p = fmadd(p, r, spread(6.931513118e-1f));
  p = fmadd(p, r, spread(1.0f));
  return scale(p, x);
}

template <class F>
inline void each_vector(int64_t size, F f) {
  for (int64_t i = 0; i < size; i += kLanes) f(i, first_lanes(size - i));
}

// LayerNorm if `centred`, RMSNorm else.
struct Norm {
  const float* weight;
  const float* bias;
  float eps;
  bool centred;
};

// norm(x) · weight + bias, of one row, put where at(i) says that values from i on go, or added to what is there if `more`.
template <class F>
void norm_row_to(const float* x, int64_t size, const Norm& how, F at, bool more = false) {
  Floats mean = spread(0.0f);
  if (how.centred) {
    Floats total = spread(0.0f);
    each_vector(size, [&](int64_t i, Mask lanes) { total = add(total, load(x + i, lanes)); });
    mean = spread(sum(total) / size);
  }
  Floats squares = spread(0.0f);
  each_vector(size, [&](int64_t i, Mask lanes) {
    const Floats value = sub(lanes, load(x + i, lanes), mean);
    squares = fmadd(value, value, squares);
  });
  const Floats scale = spread(1.0f / std::sqrt(sum(squares) / size + how.eps));
  each_vector(size, [&](int64_t i, Mask lanes) {
    Floats value = mul(sub(load(x + i, lanes), mean), scale);
    value = mul(value, load(how.weight + i, lanes));
    if (how.bias != nullptr) value = add(value, load(how.bias + i, lanes));
    if constexpr (std::is_same_v<decltype(at(i)), float*>) {
      if (more) value = add(value, load(at(i), lanes));
    }
    store(at(i), value, lanes);
  });
}

// As above, into out[size].
inline void norm_row(const float* x, int64_t size, const Norm& how, float* out, bool more = false) {
  norm_row_to(x, size, how, [out](int64_t i) { return out + i; }, more);
}

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

// In the loop of whoever calls it: as a function it cost 3 % of a scoring step. For T = bfloat16 in fewer operations.
template <class T>
[[gnu::always_inline]] inline Floats silu(Floats x) {
  const Floats one = spread(1.0f);
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Floats power = min(mul(x, spread(-kLog2E)), spread(126.0f));
    const Floats divisor = add(one, power_of_two(power)), near = near_reciprocal(divisor);
    return mul(mul(x, near), fnmadd(divisor, near, spread(2.0f)));
  } else {
    const Floats negative = min(sub(spread(0.0f), x), spread(88.0f));
    return div(x, add(one, exponential(negative)));
  }
}

inline Floats gelu_or_relu(Floats x, int64_t kind) {
  const Vec half(0.5f), one(1.0f);
  return through_torch(x, [&](Vec v) {
    switch (kind) {
      case kGeluTanh:
        return half * v * (one + (Vec(0.7978845608028654f) * (v + Vec(0.044715f) * v * v * v)).tanh());
      case kGelu:
        return half * v * (one + (v * Vec(0.7071067811865476f)).erf());
      default:
        return at::vec::maximum(v, Vec(0.0f));
    }
  });
}

// Turns the first `rotary` dimensions: x1 cos - x2 sin, x2 cos + x1 sin. turn: [rotary] of the position, cosines first.
inline void rotate(float* x, int64_t rotary, const float* turn) {
  const int64_t half = rotary / 2;
  each_vector(half, [&](int64_t i, Mask lanes) {
    const Floats a = load(x + i, lanes), b = load(x + half + i, lanes);
    const Floats cosine = load(turn + i, lanes), sine = load(turn + half + i, lanes);
    store(x + i, fmsub(a, cosine, mul(b, sine)), lanes);
    store(x + half + i, fmadd(b, cosine, mul(a, sine)), lanes);
  });
}

}  // namespace logprobs
