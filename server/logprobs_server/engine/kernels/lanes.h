// Sixteen numbers at a time: in one register of AVX-512, in two of AVX2. What is said of an operation holds of both.
// Which of the two is chosen by what torch runs on, so that both can be tried where a processor has both.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace logprobs {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;
using Mask = uint16_t;  // of 16 lanes, the first lowest

constexpr int64_t kLanes = 16;
constexpr Mask kAllLanes = 0xFFFF;

// The first `count` lanes, none below 0, all above 16.
inline Mask first_lanes(int64_t count) {
  return static_cast<Mask>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1);
}

// Stands for a mask that names all lanes, and costs nothing.
struct All {};

#ifdef __AVX512F__

constexpr bool kWide = true;
using Floats = __m512;
using Wholes = __m512i;
using Doubles = __m512d;  // 8 of them
using Flags = Mask;       // what `flags` finds

inline Floats spread(float x) { return _mm512_set1_ps(x); }
inline Wholes spread(int32_t x) { return _mm512_set1_epi32(x); }
inline Wholes ascending() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// Of the lanes that a mask names; 0, or `otherwise`, in the others.
inline Floats load(const float* from, All = {}) { return _mm512_loadu_ps(from); }
inline Floats load(const float* from, Mask lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline Floats load(const float* from, Mask lanes, Floats otherwise) {
  return _mm512_mask_loadu_ps(otherwise, lanes, from);
}
inline Wholes load(const int32_t* from, All = {}) { return _mm512_loadu_si512(from); }
inline Wholes load(const int32_t* from, Mask lanes) { return _mm512_maskz_loadu_epi32(lanes, from); }
inline Floats load(const BFloat16* from, Mask lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

inline void store(float* to, Floats x, All = {}) { _mm512_storeu_ps(to, x); }
inline void store(float* to, Floats x, Mask lanes) { _mm512_mask_storeu_ps(to, lanes, x); }
#ifdef __AVX512BF16__
inline void store(BFloat16* to, Floats x, Mask lanes) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}
#endif
inline void store_past_caches(float* to, Floats x) { _mm512_stream_ps(to, x); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fmsub(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
// As `fmadd`. Of the intrinsic GCC 12 makes forms that overwrite a or b, and copies of those.
inline Floats add_products(Floats sums, Floats a, Floats b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b if one is NaN
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b if one is NaN
inline Floats sub(Mask lanes, Floats a, Floats b) { return _mm512_maskz_sub_ps(lanes, a, b); }  // 0 in the others
inline Floats select(Mask lanes, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, lanes, yes); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats above_floor(Floats x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Floats near_reciprocal(Floats x) { return _mm512_rcp14_ps(x); }  // 12 bits of it

// x · 2^floor(power), for x in [0.5, 2) and powers of -152 to 127; 0 below 2^-149, on AVX2 below 2^-125.
inline Floats scale(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }

inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

// The largest number of each of 16 vectors; x(l) is the l-th. All at once, by halves of halves.
template <class F>
Floats largest_of_each(F x) {
  Floats quarters[4];
#pragma GCC unroll 4
  for (int l = 0; l < 4; ++l) {
    const auto halves = [](Floats a, Floats b) { return max(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE)); };
    const Floats a = halves(x(l), x(l + 4)), b = halves(x(l + 8), x(l + 12));
    quarters[l] = max(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  }
  const auto pairs = [](Floats a, Floats b) { return max(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const Floats a = pairs(quarters[0], quarters[1]), b = pairs(quarters[2], quarters[3]);
  return max(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
}

inline Wholes add(Wholes a, Wholes b) { return _mm512_add_epi32(a, b); }
inline Wholes mul(Wholes a, Wholes b) { return _mm512_mullo_epi32(a, b); }
inline Wholes bits_and(Wholes a, Wholes b) { return _mm512_and_si512(a, b); }
inline Wholes bits_xor(Wholes a, Wholes b) { return _mm512_xor_si512(a, b); }
inline Wholes left_by(Wholes x, int by) { return _mm512_slli_epi32(x, by); }
inline Wholes right_by(Wholes x, int by) { return _mm512_srli_epi32(x, by); }
inline Wholes unsigned_max(Wholes a, Wholes b) { return _mm512_max_epu32(a, b); }
inline int32_t sum(Wholes x) { return _mm512_reduce_add_epi32(x); }
inline uint32_t unsigned_largest(Wholes x) { return _mm512_reduce_max_epu32(x); }

// The same bits as another type.
inline Wholes as_wholes(Floats x) { return _mm512_castps_si512(x); }
inline Floats as_floats(Wholes x) { return _mm512_castsi512_ps(x); }

inline Wholes nearest(Floats x) { return _mm512_cvtps_epi32(x); }
inline Floats real(Wholes x) { return _mm512_cvtepi32_ps(x); }
inline __m256i lower_halves(Wholes x) { return _mm512_cvtepi32_epi16(x); }  // of each lane the lower 16 bits

// Puts the lower 16 bits of x into one half of each cell, 0 or 1, of those lanes.
inline void store_half(int32_t* to, Wholes x, int half, Mask lanes) {
  _mm512_mask_storeu_epi16(to, _pdep_u32(lanes, 0x55555555u) << half, left_by(x, 16 * half));
}

// sums + a · b in each lane, of both of its halves of 16 bits.
inline Wholes add_products(Wholes sums, Wholes a, Wholes b) {
#ifdef __AVX512VNNI__
  // Of the intrinsic GCC 12 puts the sums aside after each product, which takes twice as long.
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
#else
  return add(sums, _mm512_madd_epi16(a, b));
#endif
}

template <int kCompare>
Mask compare(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(a, b, kCompare);
}

// What a comparison finds, if all that matters is whether it is true of a lane at all.
template <int kCompare>
Flags flags(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(a, b, kCompare);
}
inline Flags no_flags() { return 0; }
inline Flags either(Flags a, Flags b) { return a | b; }
inline bool any(Flags x) { return x != 0; }

// counts, 1 more where x is above a bound.
inline Wholes count_above(Wholes counts, Floats x, Floats bound) {
  return _mm512_mask_add_epi32(counts, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), counts, _mm512_set1_epi32(1));
}

// a · b where a > 0, 0 elsewhere, whatever b is.
inline Floats mul_positive(Floats a, Floats b) {
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ), a, b);
}

inline Doubles no_doubles() { return _mm512_setzero_pd(); }
inline Doubles add(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
inline double sum(Doubles x) { return _mm512_reduce_add_pd(x); }

// The first half of the lanes plus the second, in double.
inline Doubles add_halves(Floats x) {
  return _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}

// f of torch's vectors.
template <class F>
Floats through_torch(Floats x, F f) {
  return f(Vec(x));
}

#else

constexpr bool kWide = false;
struct Floats {
  __m256 low, high;
};
struct Wholes {
  __m256i low, high;
};
struct Doubles {
  __m256d low, high;
};
using Flags = Floats;

inline Floats spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Wholes spread(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Wholes ascending() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

inline Wholes add(Wholes a, Wholes b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Wholes mul(Wholes a, Wholes b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
inline Wholes bits_and(Wholes a, Wholes b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline Wholes bits_xor(Wholes a, Wholes b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }
inline Wholes left_by(Wholes x, int by) { return {_mm256_slli_epi32(x.low, by), _mm256_slli_epi32(x.high, by)}; }
inline Wholes right_by(Wholes x, int by) { return {_mm256_srli_epi32(x.low, by), _mm256_srli_epi32(x.high, by)}; }
inline Wholes unsigned_max(Wholes a, Wholes b) { return {_mm256_max_epu32(a.low, b.low), _mm256_max_epu32(a.high, b.high)}; }

inline Wholes as_wholes(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Floats as_floats(Wholes x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }

// All bits of the lanes that a mask names.
inline Wholes lanes_of(Mask lanes) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
  const __m256i named = _mm256_set1_epi32(lanes);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(named, low), low), _mm256_cmpeq_epi32(_mm256_and_si256(named, high), high)};
}

inline Floats select(Mask lanes, Floats yes, Floats no) {
  if (lanes == kAllLanes) return yes;
  const Floats by = as_floats(lanes_of(lanes));
  return {_mm256_blendv_ps(no.low, yes.low, by.low), _mm256_blendv_ps(no.high, yes.high, by.high)};
}

inline Floats load(const float* from, All = {}) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load(const float* from, Mask lanes) {
  if (lanes == kAllLanes) return load(from);
  const Wholes by = lanes_of(lanes);
  return {_mm256_maskload_ps(from, by.low), _mm256_maskload_ps(from + 8, by.high)};
}
inline Floats load(const float* from, Mask lanes, Floats otherwise) { return select(lanes, load(from, lanes), otherwise); }
inline Wholes load(const int32_t* from, All = {}) {
  const __m256i* at = reinterpret_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
inline Wholes load(const int32_t* from, Mask lanes) {
  if (lanes == kAllLanes) return load(from);
  const Wholes by = lanes_of(lanes);
  return {_mm256_maskload_epi32(from, by.low), _mm256_maskload_epi32(from + 8, by.high)};
}
inline Floats load(const BFloat16* from, Mask lanes) {  // the first ones
  BFloat16 some[kLanes] = {};
  if (lanes != kAllLanes) from = std::copy_n(from, __builtin_popcount(lanes), some) - __builtin_popcount(lanes);
  const __m128i* at = reinterpret_cast<const __m128i*>(from);
  return as_floats(left_by({_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), _mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1))}, 16));
}

inline void store(float* to, Floats x, All = {}) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
inline void store(float* to, Floats x, Mask lanes) {
  if (lanes == kAllLanes) return store(to, x);
  const Wholes by = lanes_of(lanes);
  _mm256_maskstore_ps(to, by.low, x.low);
  _mm256_maskstore_ps(to + 8, by.high, x.high);
}
inline void store_past_caches(float* to, Floats x) {
  _mm256_stream_ps(to, x.low);
  _mm256_stream_ps(to + 8, x.high);
}

inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// As `fmadd`. Of the intrinsic GCC 12 moves the sums about, for which there are too few registers.
inline Floats add_products(Floats sums, Floats a, Floats b) {
  __m256 low = sums.low, high = sums.high;
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(low) : "x"(a.low), "x"(b.low));
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(high) : "x"(a.high), "x"(b.high));
  return {low, high};
}
inline Floats fmsub(Floats a, Floats b, Floats c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats fnmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats sub(Mask lanes, Floats a, Floats b) { return select(lanes, sub(a, b), spread(0.0f)); }
inline Floats magnitude(Floats x) { return as_floats(bits_and(as_wholes(x), spread(0x7FFFFFFF))); }
inline Floats rounded(Floats x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
inline Floats floor(Floats x) { return {_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)}; }
inline Floats above_floor(Floats x) { return sub(x, floor(x)); }
inline Floats near_reciprocal(Floats x) { return {_mm256_rcp_ps(x.low), _mm256_rcp_ps(x.high)}; }

inline Wholes nearest(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Floats real(Wholes x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

inline Floats scale(Floats x, Floats power) {
  const Wholes by = nearest(floor(power)), found = add(as_wholes(x), left_by(by, 23));
  const __m256i least = _mm256_set1_epi32(-126);
  return as_floats({_mm256_and_si256(found.low, _mm256_cmpgt_epi32(by.low, least)),
                    _mm256_and_si256(found.high, _mm256_cmpgt_epi32(by.high, least))});
}

// f of halves until one lane is left. Floats and whole numbers have instructions of their own for it.
template <class F>
float reduced(Floats x, F f) {
  const __m256 eight = f(x.low, x.high), four = f(eight, _mm256_permute2f128_ps(eight, eight, 1));
  const __m256 two = f(four, _mm256_permute_ps(four, 0b01001110)), one = f(two, _mm256_permute_ps(two, 0b10110001));
  return _mm256_cvtss_f32(one);
}
inline float sum(Floats x) { return reduced(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); }); }
inline float largest(Floats x) { return reduced(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); }); }

template <class F>
Floats largest_of_each(F x) {
  alignas(32) float found[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) found[l] = largest(x(l));
  return load(found);
}

template <class F>
int32_t reduced(Wholes x, F f) {
  const __m256i eight = f(x.low, x.high), four = f(eight, _mm256_permute2x128_si256(eight, eight, 1));
  const __m256i two = f(four, _mm256_shuffle_epi32(four, 0b01001110)), one = f(two, _mm256_shuffle_epi32(two, 0b10110001));
  return _mm256_cvtsi256_si32(one);
}
inline int32_t sum(Wholes x) { return reduced(x, [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }); }
inline uint32_t unsigned_largest(Wholes x) {
  return static_cast<uint32_t>(reduced(x, [](__m256i a, __m256i b) { return _mm256_max_epu32(a, b); }));
}

inline __m256i lower_halves(Wholes x) {
  const Wholes halves = bits_and(x, spread(0xFFFF));
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(halves.low, halves.high), 0b11011000);
}

inline void store_half(int32_t* to, Wholes x, int half, Mask lanes) {
  const Wholes kept = bits_and(load(to, lanes), spread(half == 0 ? -0x10000 : 0xFFFF)), by = lanes_of(lanes);
  const Wholes put = add(kept, left_by(bits_and(x, spread(0xFFFF)), 16 * half));
  _mm256_maskstore_epi32(to, by.low, put.low);
  _mm256_maskstore_epi32(to + 8, by.high, put.high);
}

inline Wholes add_products(Wholes sums, Wholes a, Wholes b) {
  __m256i low = sums.low, high = sums.high, product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(low), "=&x"(product) : "x"(a.low), "x"(b.low));
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(high), "=&x"(product) : "x"(a.high), "x"(b.high));
  return {low, high};
}

template <int kCompare>
Flags flags(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, kCompare), _mm256_cmp_ps(a.high, b.high, kCompare)};
}
inline Flags no_flags() { return spread(0.0f); }
inline Flags either(Flags a, Flags b) { return {_mm256_or_ps(a.low, b.low), _mm256_or_ps(a.high, b.high)}; }
inline bool any(Flags x) { return _mm256_movemask_ps(_mm256_or_ps(x.low, x.high)) != 0; }

template <int kCompare>
Mask compare(Floats a, Floats b) {
  const Flags found = flags<kCompare>(a, b);
  return static_cast<Mask>(_mm256_movemask_ps(found.low) | _mm256_movemask_ps(found.high) << 8);
}

inline Wholes count_above(Wholes counts, Floats x, Floats bound) {
  const Wholes found = as_wholes(flags<_CMP_GT_OQ>(x, bound));  // -1 where it is
  return {_mm256_sub_epi32(counts.low, found.low), _mm256_sub_epi32(counts.high, found.high)};
}

inline Floats mul_positive(Floats a, Floats b) {
  const Flags found = flags<_CMP_GT_OQ>(a, spread(0.0f));
  const Floats product = mul(a, b);
  return {_mm256_and_ps(product.low, found.low), _mm256_and_ps(product.high, found.high)};
}

inline Doubles no_doubles() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline Doubles add(Doubles a, Doubles b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
inline double sum(Doubles x) {
  alignas(32) double four[4];
  _mm256_store_pd(four, _mm256_add_pd(x.low, x.high));
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline Doubles add_halves(Floats x) {
  const auto part = [&](auto half) { return _mm256_add_pd(_mm256_cvtps_pd(half(x.low)), _mm256_cvtps_pd(half(x.high))); };
  return {part([](__m256 y) { return _mm256_castps256_ps128(y); }), part([](__m256 y) { return _mm256_extractf128_ps(y, 1); })};
}

template <class F>
Floats through_torch(Floats x, F f) {
  return {f(Vec(x.low)), f(Vec(x.high))};
}

#endif

}  // namespace logprobs
