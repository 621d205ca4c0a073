// Rows of numbers: vectors of 16, exponentials, norms, activations, rotation. What a row becomes depends on it alone.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace logprobs {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = 16;
constexpr int64_t kColumns = 32;  // outputs that one block of packed weights gives
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// The first `count` lanes, none below 0, all above 16.
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1);
}

// Stands for a mask that names all lanes, and costs nothing.
struct All {};

// Of the lanes that a mask names, 0 in the others.
inline __m512 load(const float* from, All = {}) { return _mm512_loadu_ps(from); }
inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512i load(const int32_t* from, All = {}) { return _mm512_loadu_si512(from); }
inline __m512i load(const int32_t* from, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, from); }
inline __m512 load(const BFloat16* from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

inline void store(float* to, __m512 values, All = {}) { _mm512_storeu_ps(to, values); }
inline void store(float* to, __m512 values, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, values); }
inline void store(BFloat16* to, __m512 values, __mmask16 mask) {
#ifdef __AVX512BF16__
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(values);
#else
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7FC00000));
  const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
  _mm256_mask_storeu_epi16(to, mask, rounded);
}

// e to the power of each lane, at most 1 ulp off up to 88; exactly 0 below -104, -inf included. Cody-Waite reduction
// and Cephes' polynomial for expf.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)),
                                            _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, power);
}

// 2 to the power of each lane, at most 3 ulp off up to 127; exactly 1 at 0, exactly 0 below -151, -inf included. 1 plus a
// polynomial of least relative error on [0, 1), 8.2e-8.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-152.0f));
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 p = _mm512_set1_ps(1.867130070e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.017030322e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.579991310e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.401644502e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931513118e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// Sum of all lanes in double.
inline __m512d add_halves(__m512 values) {
  return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(values)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1)));
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

// out = norm(x) · weight + bias, of one row, added to what `out` holds if `add`.
template <class T>
void norm_row(const float* x, int64_t size, const Norm& how, T* out, bool add = false) {
  __m512 mean = _mm512_setzero_ps();
  if (how.centred) {
    __m512 total = _mm512_setzero_ps();
    each_vector(size, [&](int64_t i, __mmask16 lanes) { total = _mm512_add_ps(total, load(x + i, lanes)); });
    mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / size);
  }
  __m512 squares = _mm512_setzero_ps();
  each_vector(size, [&](int64_t i, __mmask16 lanes) {
    const __m512 value = _mm512_maskz_sub_ps(lanes, load(x + i, lanes), mean);
    squares = _mm512_fmadd_ps(value, value, squares);
  });
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / size + how.eps));
  each_vector(size, [&](int64_t i, __mmask16 lanes) {
    __m512 value = _mm512_mul_ps(_mm512_sub_ps(load(x + i, lanes), mean), scale);
    value = _mm512_mul_ps(value, load(how.weight + i, lanes));
    if (how.bias != nullptr) value = _mm512_add_ps(value, load(how.bias + i, lanes));
    if constexpr (std::is_same_v<T, float>) {
      if (add) value = _mm512_add_ps(value, load(out + i, lanes));
    }
    store(out + i, value, lanes);
  });
}

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

// In the loop of whoever calls it: as a function it cost 3 % of a scoring step. For T = bfloat16 in fewer operations.
template <class T>
[[gnu::always_inline]] inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __m512 power = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)), _mm512_set1_ps(126.0f));
    const __m512 divisor = _mm512_add_ps(one, power_of_two(power)), near = _mm512_rcp14_ps(divisor);
    return _mm512_mul_ps(_mm512_mul_ps(x, near), _mm512_fnmadd_ps(divisor, near, _mm512_set1_ps(2.0f)));
  } else {
    const __m512 negative = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(88.0f));
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(negative)));
  }
}

inline __m512 gelu_or_relu(__m512 x, int64_t kind) {
  const Vec v(x), half(0.5f), one(1.0f);
  switch (kind) {
    case kGeluTanh:
      return half * v * (one + (Vec(0.7978845608028654f) * (v + Vec(0.044715f) * v * v * v)).tanh());
    case kGelu:
      return half * v * (one + (v * Vec(0.7071067811865476f)).erf());
    default:
      return at::vec::maximum(v, Vec(0.0f));
  }
}

template <class T>
[[gnu::always_inline]] inline __m512 activated(__m512 x, int64_t kind) {
  return kind == kSilu ? silu<T>(x) : gelu_or_relu(x, kind);
}

// Turns the first `rotary` dimensions: x1 cos - x2 sin, x2 cos + x1 sin. turn: [rotary] of the position, cosines first.
inline void rotate(float* x, int64_t rotary, const float* turn) {
  const int64_t half = rotary / 2;
  each_vector(half, [&](int64_t i, __mmask16 lanes) {
    const __m512 a = load(x + i, lanes), b = load(x + half + i, lanes);
    const __m512 cosine = load(turn + i, lanes), sine = load(turn + half + i, lanes);
    store(x + i, _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)), lanes);
    store(x + half + i, _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)), lanes);
  });
}

}  // namespace logprobs
