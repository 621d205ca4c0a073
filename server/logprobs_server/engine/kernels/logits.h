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
  for (; i + kFour <= end; i += kFour) f(i, [](int64_t) { return static_cast<Mask>(0xFFFF); });
  if (i < end) f(i, [&](int64_t v) { return first_lanes(end - i - v * kLanes); });
}

// Puts what is better than the worst of `best` into it, of 16 logits from row[begin] on, those of `lanes`.
inline void choose(const float* row, int64_t begin, Mask lanes, int64_t most, std::vector<Candidate>& best) {
  const auto full = [&] { return static_cast<int64_t>(best.size()) == most; };
  const Floats x = load(row + begin, lanes);
  Mask better = lanes & (full() ? compare<_CMP_GT_OQ>(x, spread(best.back().value)) : compare<_CMP_ORD_Q>(x, x));
  for (; better != 0; better &= better - 1) {
    const int64_t id = begin + __builtin_ctz(better);
    if (!full() || row[id] > best.back().value) insert(best, most, {row[id], id});
  }
}

// Finds the best of row[begin … end), and counts.
inline void search(const float* row, int64_t begin, int64_t end, float limit, int64_t most, Part& part) {
  const Floats bound = spread(limit), finite = spread(std::numeric_limits<float>::max());
  Wholes greater = spread(0);
  Flags odd = no_flags();
  part.best.clear();
  each_four(begin, end, [&](int64_t i, auto lanes) {
    Floats peak = spread(kMasked);
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      const Floats x = load(row + i + v * kLanes, lanes(v), spread(kMasked));
      greater = count_above(greater, x, bound);
      odd = either(odd, flags<_CMP_NLE_UQ>(x, finite));
      peak = max(peak, x);
    }
    const bool full = static_cast<int64_t>(part.best.size()) == most;
    if (full && !any(flags<_CMP_GT_OQ>(peak, spread(part.best.back().value)))) return;
    for (int64_t v = 0; v < 4; ++v) choose(row, i + v * kLanes, lanes(v), most, part.best);
  });
  part.greater += sum(greater);
  part.odd |= any(odd);
}

// Sums over row[begin … end), relative to the chunk's largest, of all that is not in `best`. Four vectors of weights are
// added in float32, which costs less than their own rounding, then in double.
inline void accumulate(float* row, int64_t begin, int64_t end, bool moments, Part& part) {
  part.largest = part.best.front().value;
  if (part.largest == kMasked) return;
  for (const Candidate& candidate : part.best) row[candidate.id] = kMasked;
  Doubles total = no_doubles(), moment = no_doubles();
  const Floats largest = spread(part.largest), masked = spread(kMasked);
  each_four(begin, end, [&](int64_t i, auto lanes) {
    Floats weights = spread(0.0f);
#pragma GCC unroll 4
    for (int64_t v = 0; v < 4; ++v) {
      const Floats x = sub(load(row + i + v * kLanes, lanes(v), masked), largest);
      const Floats weight = exponential(x);
      weights = add(weights, weight);
      if (moments) moment = add(moment, add_halves(mul_positive(weight, x)));
    }
    total = add(total, add_halves(weights));
  });
  part.total = sum(total);
  part.moment = sum(moment);
  if (part.total == 0.0)  // float32 has no number that small
    for (int64_t i = begin; i < end; ++i) {
      const double x = static_cast<double>(row[i]) - part.largest, weight = std::exp(x);
      part.total += weight;
      if (weight > 0) part.moment += weight * x;
    }
  for (const Candidate& candidate : part.best) row[candidate.id] = candidate.value;
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
inline Wholes random_bits(Wholes ids, int32_t first, int32_t second) {
  const auto times = [](Wholes x, uint32_t by) { return mul(x, spread(static_cast<int32_t>(by))); };
  Wholes bits = add(times(ids, 0x9E3779B1u), spread(first));
  bits = times(bits_xor(bits, right_by(bits, 16)), 0x85EBCA6Bu);
  bits = bits_xor(bits, spread(second));
  bits = times(bits_xor(bits, right_by(bits, 13)), 0xC2B2AE35u);
  bits = bits_xor(bits, right_by(bits, 16));
  return bits_and(bits, spread(0x7FFFFFFF));
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
  alignas(64) float scores[kLanes];
  Leg leg;
  Doubles total = no_doubles();
  Floats slack = spread(std::numeric_limits<float>::infinity());  // exp(-best), a little more
  for (int64_t i = begin; i < end; i += kLanes) {
    const Floats raw = load(row + i, first_lanes(end - i), spread(kMasked));
    const Floats x = div(sub(raw, spread(largest)), spread(temperature));
    const Floats weight = exponential(x);
    total = add(total, add_halves(weight));
    const Mask possible = compare<_CMP_GT_OQ>(x, spread(kMasked));
    leg.size += __builtin_popcount(possible);
    const Wholes bits = random_bits(add(spread(static_cast<int32_t>(i)), ascending()), key[0], key[1]);
    const Floats uniform = mul(add(real(bits), spread(0.5f)), spread(0x1p-31f));
    const Floats reach = mul(weight, slack);
    if ((possible & compare<_CMP_NGT_UQ>(uniform, reach)) == 0) continue;
    store(scores, sub(x, through_torch(uniform, [](Vec u) {
                        return at::vec::minimum(u, Vec(1.0f - 0x1p-24f)).neg().log1p().neg().log();
                      })));
    for (int64_t l = 0; l < std::min(kLanes, end - i); ++l)
      if (scores[l] > leg.best) {
        leg.best = scores[l];
        leg.id = i + l;
        slack = spread(std::exp(-leg.best) * 1.001f);
      }
  }
  leg.total = sum(total);
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
      Floats peak = spread(kMasked);
      for (int64_t j = begin; j < end; j += kLanes)
        peak = max(peak, load(row + j, first_lanes(end - j), peak));
      peaks[i] = logprobs::largest(peak);
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
