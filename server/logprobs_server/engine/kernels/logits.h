// Rows of logits: what is told of a distribution, and drawing from it. A row is read in chunks of fixed size, each by
// one thread; what they give is put together in their order, so that the number of threads changes nothing.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <tuple>
#include <vector>

#include "product.h"

namespace logprobs {

constexpr int64_t kChunk = 8192;  // columns; 32 KiB

struct Candidate {
  float value;
  int64_t id;
  // By value, then by lower id.
  bool operator<(const Candidate& other) const { return value > other.value || (value == other.value && id < other.id); }
};

// What a chunk of a row gives.
struct Part {
  std::vector<Candidate> best;  // the most probable of the chunk, best first
  int64_t greater = 0;          // logits above that of the chosen token
  bool odd = false;             // a NaN or +inf is among them
  float largest = kMasked;
  double total = 0.0;   // of exp(x - largest), without those in `best`
  double moment = 0.0;  // of exp(x - largest) · (x - largest), without those in `best`
};

inline void insert(std::vector<Candidate>& best, int64_t most, Candidate candidate) {
  best.insert(std::upper_bound(best.begin(), best.end(), candidate), candidate);
  if (static_cast<int64_t>(best.size()) > most) best.pop_back();
}

// f(i, lanes) for every fourth vector's column i from `begin` on; lanes(v) are those of vector i + v that come before
// `end`, known to be all but in the last call.
template <class F>
inline void each_four(int64_t begin, int64_t end, F f) {
  constexpr int64_t kFour = 4 * kLanes;
  int64_t i = begin;
  for (; i + kFour <= end; i += kFour) f(i, [](int64_t) { return static_cast<__mmask16>(0xFFFF); });
  if (i < end) f(i, [&](int64_t v) { return first_lanes(end - i - v * kLanes); });
}

// Puts what is better than the worst of `best` into it, of 16 logits from row[begin] on, those of `lanes`.
inline void choose(const float* row, int64_t begin, __mmask16 lanes, int64_t most, std::vector<Candidate>& best) {
  const auto full = [&] { return static_cast<int64_t>(best.size()) == most; };
  const __m512 x = load(row + begin, lanes);
  __mmask16 better = full() ? _mm512_mask_cmp_ps_mask(lanes, x, _mm512_set1_ps(best.back().value), _CMP_GT_OQ)
                            : _mm512_mask_cmp_ps_mask(lanes, x, x, _CMP_ORD_Q);
  for (; better != 0; better &= better - 1) {
    const int64_t id = begin + __builtin_ctz(better);
    if (!full() || row[id] > best.back().value) insert(best, most, {row[id], id});
  }
}

// Finds the best of row[begin … end), and counts.
inline void search(const float* row, int64_t begin, int64_t end, float limit, int64_t most, Part& part) {
  const __m512 bound = _mm512_set1_ps(limit), finite = _mm512_set1_ps(std::numeric_limits<float>::max());
  const __m512i one = _mm512_set1_epi32(1);
  __m512i greater = _mm512_setzero_si512();
  __mmask16 odd = 0;
  part.best.clear();
  each_four(begin, end, [&](int64_t i, auto lanes) {
    __m512 peak = _mm512_set1_ps(kMasked);
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      const __m512 x = _mm512_mask_loadu_ps(_mm512_set1_ps(kMasked), lanes(v), row + i + v * kLanes);
      greater = _mm512_mask_add_epi32(greater, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), greater, one);
      odd |= _mm512_cmp_ps_mask(x, finite, _CMP_NLE_UQ);
      peak = _mm512_max_ps(peak, x);
    }
    const bool full = static_cast<int64_t>(part.best.size()) == most;
    if (full && _mm512_cmp_ps_mask(peak, _mm512_set1_ps(part.best.back().value), _CMP_GT_OQ) == 0) return;
    for (int64_t v = 0; v < 4; ++v) choose(row, i + v * kLanes, lanes(v), most, part.best);
  });
  part.greater += _mm512_reduce_add_epi32(greater);
  part.odd |= odd != 0;
}

// Sums over row[begin … end), relative to the chunk's largest, of all that is not in `best`. Four vectors of weights are
// added in float32, which costs less than their own rounding, then in double.
inline void accumulate(float* row, int64_t begin, int64_t end, bool moments, Part& part) {
  part.largest = part.best.front().value;
  if (part.largest == kMasked) return;
  for (const Candidate& candidate : part.best) row[candidate.id] = kMasked;
  __m512d total = _mm512_setzero_pd(), moment = _mm512_setzero_pd();
  const __m512 largest = _mm512_set1_ps(part.largest), masked = _mm512_set1_ps(kMasked);
  each_four(begin, end, [&](int64_t i, auto lanes) {
    __m512 weights = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      const __m512 x = _mm512_sub_ps(_mm512_mask_loadu_ps(masked, lanes(v), row + i + v * kLanes), largest);
      const __m512 weight = exponential(x);
      weights = _mm512_add_ps(weights, weight);
      if (moments) {
        const __mmask16 counts = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_GT_OQ);
        moment = _mm512_add_pd(moment, add_halves(_mm512_maskz_mul_ps(counts, weight, x)));
      }
    }
    total = _mm512_add_pd(total, add_halves(weights));
  });
  for (const Candidate& candidate : part.best) row[candidate.id] = candidate.value;
  part.total = _mm512_reduce_add_pd(total);
  part.moment = _mm512_reduce_add_pd(moment);
}

// Where `row_statistics` puts what it finds of a row.
struct Told {
  double* normaliser;  // log-sum-exp
  float* floats;       // [4]: logprob of the chosen token, log of the mass outside the top, entropy, 1 if odd
  int64_t* counts;     // [2]: rank of the chosen token, id of the largest logit
  float* logprobs;     // the top's
  int64_t* ids;        // and their ids
};

// Puts the parts of a row together; `limit` is the logit of the chosen token, +inf if that is the largest one's.
inline void conclude(float limit, int64_t top, const Part* parts, int64_t chunks, const Told& told) {
  std::vector<Candidate> merged;
  int64_t rank = 1;
  bool odd = false;
  for (int64_t c = 0; c < chunks; ++c) {
    merged.insert(merged.end(), parts[c].best.begin(), parts[c].best.end());
    rank += parts[c].greater;
    odd = odd || parts[c].odd;
  }
  std::sort(merged.begin(), merged.end());
  if (odd || merged.empty() || merged.front().value == kMasked) {
    told.floats[3] = 1.0f;
    return;
  }
  const float largest = merged.front().value;
  double tail = 0.0, moment = 0.0, head = 0.0;
  for (int64_t c = 0; c < chunks; ++c) {
    if (parts[c].largest == kMasked) continue;
    const double shift = static_cast<double>(parts[c].largest) - largest, scale = std::exp(shift);
    tail += parts[c].total * scale;
    moment += (parts[c].moment + parts[c].total * shift) * scale;
  }
  for (size_t k = 0; k < merged.size(); ++k) {
    const double difference = static_cast<double>(merged[k].value) - largest, weight = std::exp(difference);
    (static_cast<int64_t>(k) < top ? head : tail) += weight;
    if (weight > 0) moment += weight * difference;
  }
  const double total = head + tail, normaliser = largest + std::log(total);
  const auto logprob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - normaliser); };
  *told.normaliser = normaliser;
  told.floats[0] = logprob(std::min(limit, largest));
  told.floats[1] = static_cast<float>(std::log(tail / total));
  told.floats[2] = static_cast<float>(std::log(total) - moment / total);
  told.counts[0] = rank;
  told.counts[1] = merged.front().id;
  for (int64_t k = 0; k < std::min<int64_t>(top, merged.size()); ++k) {
    told.logprobs[k] = logprob(merged[k].value);
    told.ids[k] = merged[k].id;
  }
}

// What is told of each row of logits [rows, vocab]: normalisers [rows] double, floats [rows, 4], counts [rows, 2],
// logprobs and ids of the most probable tokens [rows, most], see `Told`; zeros where there is nothing to tell. Of each
// row: chosen, the token that stands there, -1 for the largest; wanted, how many of the most probable; entropies, whether
// to sum up for it. Logits are left as they were.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_statistics(const Tensor& logits, at::IntArrayRef chosen,
                                                                         at::IntArrayRef wanted,
                                                                         const c10::List<bool>& entropies) {
  const int64_t rows = logits.size(0), vocab = logits.size(1), chunks = (vocab + kChunk - 1) / kChunk;
  const int64_t given[] = {static_cast<int64_t>(chosen.size()), static_cast<int64_t>(wanted.size()),
                           static_cast<int64_t>(entropies.size())};
  for (const int64_t count : given) TORCH_CHECK(count == rows && rows > 0, rows, " rows, options of ", count);
  const int64_t most = *std::max_element(wanted.begin(), wanted.end());
  const Tensor normalisers = at::zeros({rows}, at::kDouble), floats = at::zeros({rows, 4}, at::kFloat);
  const Tensor counts = at::zeros({rows, 2}, at::kLong), ids = at::zeros({rows, most}, at::kLong);
  const Tensor logprobs = at::zeros({rows, most}, at::kFloat);
  float* all = data<float>(logits);
  std::vector<float> limits(rows, std::numeric_limits<float>::infinity());
  for (int64_t r = 0; r < rows; ++r)
    if (chosen[r] >= 0) limits[r] = all[r * vocab + chosen[r]];
  std::vector<Part> parts(rows * chunks);
  const std::vector<bool> moments(entropies.begin(), entropies.end());
  Team& team = Team::get();
  team.run([&] {
    team.each(rows * chunks, [&](int64_t i) {
      const int64_t r = i / chunks, begin = i % chunks * kChunk, end = std::min(vocab, begin + kChunk);
      search(all + r * vocab, begin, end, limits[r], std::max<int64_t>(1, wanted[r]), parts[i]);
      if (!parts[i].odd) accumulate(all + r * vocab, begin, end, moments[r], parts[i]);
    });
    team.each(rows, [&](int64_t r) {
      conclude(limits[r], wanted[r], &parts[r * chunks], chunks,
               Told{data<double>(normalisers) + r, data<float>(floats) + 4 * r, data<int64_t>(counts) + 2 * r,
                    data<float>(logprobs) + most * r, data<int64_t>(ids) + most * r});
    });
  });
  return {normalisers, floats, counts, logprobs, ids};
}

// What a token's hash becomes: 31 random bits for 16 tokens, as VocabularyNoise in random.py makes them.
inline __m512i random_bits(__m512i ids, int32_t first, int32_t second) {
  const auto times = [](__m512i x, uint32_t by) { return _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int32_t>(by))); };
  __m512i bits = _mm512_add_epi32(times(ids, 0x9E3779B1u), _mm512_set1_epi32(first));
  bits = times(_mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16)), 0x85EBCA6Bu);
  bits = _mm512_xor_si512(bits, _mm512_set1_epi32(second));
  bits = times(_mm512_xor_si512(bits, _mm512_srli_epi32(bits, 13)), 0xC2B2AE35u);
  bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
  return _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
}

// A chunk's part of a race.
struct Leg {
  float best = kMasked;
  int64_t id = 0, size = 0;
  double total = 0.0;
};

// Runs the tokens of row[begin … end): the largest of (x - largest) / temperature - log Exponential(1) wins. A token
// with uniform variable u can only beat `best` if u <= -log(1 - u) < exp(x - best), which spares most of them two
// logarithms.
inline Leg run(const float* row, int64_t begin, int64_t end, float largest, float temperature, const int32_t* key) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  alignas(64) float scores[kLanes];
  Leg leg;
  __m512d total = _mm512_setzero_pd();
  __m512 slack = _mm512_set1_ps(std::numeric_limits<float>::infinity());  // exp(-best), a little more
  for (int64_t i = begin; i < end; i += kLanes) {
    const __m512 raw = _mm512_mask_loadu_ps(_mm512_set1_ps(kMasked), first_lanes(end - i), row + i);
    const __m512 x = _mm512_div_ps(_mm512_sub_ps(raw, _mm512_set1_ps(largest)), _mm512_set1_ps(temperature));
    const __m512 weight = exponential(x);
    total = _mm512_add_pd(total, add_halves(weight));
    const __mmask16 possible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kMasked), _CMP_GT_OQ);
    leg.size += __builtin_popcount(possible);
    const __m512i bits = random_bits(_mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(i)), lanes), key[0], key[1]);
    const Vec uniform = (Vec(_mm512_cvtepi32_ps(bits)) + Vec(0.5f)) * Vec(0x1p-31f);
    const __m512 reach = _mm512_mul_ps(weight, slack);
    if ((possible & _mm512_cmp_ps_mask(uniform, reach, _CMP_NGT_UQ)) == 0) continue;
    const Vec score = Vec(x) - at::vec::minimum(uniform, Vec(1.0f - 0x1p-24f)).neg().log1p().neg().log();
    score.store(scores);
    for (int64_t l = 0; l < std::min(kLanes, end - i); ++l)
      if (scores[l] > leg.best) {
        leg.best = scores[l];
        leg.id = i + l;
        slack = _mm512_set1_ps(std::exp(-leg.best) * 1.001f);
      }
  }
  leg.total = _mm512_reduce_add_pd(total);
  return leg;
}

// Draws one token of each row of logits [rows, vocab], none truncated, by an exponential race: winners [rows], their
// logprobs under the scaled distribution [rows] double, and how many tokens could be drawn [rows].
// temperatures [rows] float32, keys [rows, 2] int32.
inline void race(const Tensor& logits, const Tensor& temperatures, const Tensor& keys, const Tensor& winners,
                 const Tensor& logprobs, const Tensor& sizes) {
  const int64_t rows = logits.size(0), vocab = logits.size(1), chunks = (vocab + kChunk - 1) / kChunk;
  const float *all = data<float>(logits), *temperature = data<float>(temperatures);
  const int32_t* key = data<int32_t>(keys);
  std::vector<float> peaks(rows * chunks);
  std::vector<Leg> legs(rows * chunks);
  const auto largest = [&](int64_t r) { return *std::max_element(&peaks[r * chunks], &peaks[0] + (r + 1) * chunks); };
  Team& team = Team::get();
  team.run([&] {
    team.each(rows * chunks, [&](int64_t i) {
      const int64_t begin = i % chunks * kChunk, end = std::min(vocab, begin + kChunk);
      const float* row = all + i / chunks * vocab;
      __m512 peak = _mm512_set1_ps(kMasked);
      for (int64_t j = begin; j < end; j += kLanes)
        peak = _mm512_max_ps(peak, _mm512_mask_loadu_ps(peak, first_lanes(end - j), row + j));
      peaks[i] = _mm512_reduce_max_ps(peak);
    });
    team.each(rows * chunks, [&](int64_t i) {
      const int64_t r = i / chunks, begin = i % chunks * kChunk, end = std::min(vocab, begin + kChunk);
      legs[i] = run(all + r * vocab, begin, end, largest(r), temperature[r], key + 2 * r);
    });
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
    const float scaled = (all[r * vocab + whole.id] - largest(r)) / temperature[r];
    data<int64_t>(winners)[r] = whole.id;
    data<double>(logprobs)[r] = scaled - std::log(whole.total);
    data<int64_t>(sizes)[r] = whole.size;
  }
}

}  // namespace logprobs
