// Chooses a token per row of logits, without sorting the vocabulary and without a copy of it.
//
//   scores = logits / temperature;  odds = exp(score - highest score)
//   top-k, top-p -> border: the last score that is kept -> inverse CDF in the order of the vocabulary
//
// The border is found by narrowing. A histogram over the range of scores tells in which bin top-k or
// top-p is reached; the next one is over the scores of that bin alone, and so on until those that are
// left are equal:
//
//   |highest ...|.......|...*...|.......|  a thousand bins, each with its count and its mass
//                       |.|*|.|.|.|.|.|.|  the same over the bin at the border
//
// Plain loops over chunks for the compiler to vectorize: any instruction set, float32 and bfloat16.
// Mass is summed in double, in an order that depends on the row alone.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

namespace sluice {
namespace {

using at::Tensor;

constexpr int64_t CHUNK = 512;  // numbers that are worked on at a time, in L1
constexpr int NUM_BINS = 1024;  // of a histogram; one more takes what lies below its range
constexpr int NUM_COPIES = 4;   // neighbours that hit the same bin would wait for each other
constexpr float LEAST_EXPONENT = -87.0f;  // odds below e^-87 are zero
constexpr float INF = std::numeric_limits<float>::infinity();

inline float to_float(float x) { return x; }

inline float to_float(at::BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}

// e^x for x <= 0, relative error 1e-7, exact at 0; zero below the least exponent and for NaN.
inline float exp_or_zero(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: leaves the nearest integer
  const float n = shifted - 12582912.0f;
  float r = n * -0.693359375f + x;
  r = n * 2.12194440e-4f + r;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x >= LEAST_EXPONENT ? p * power : 0.0f;
}

// What a pass over the logits of a row tells.
struct Extremes {
  float most = -INF;
  float least = INF;   // of the finite
  int64_t chunk = 0;   // number of the first chunk that holds `most`, or NaN
  bool has_nan = false;
};

template <class T>
Extremes extremes(const T* x, int64_t size) {
  Extremes seen;
  for (int64_t first = 0; first < size; first += CHUNK) {
    const int64_t n = std::min(CHUNK, size - first);
    float most = -INF, least = INF;
    int is_nan = 0;
#pragma omp simd reduction(max : most) reduction(min : least) reduction(| : is_nan)
    for (int64_t i = 0; i < n; ++i) {
      const float value = to_float(x[first + i]);
      most = value > most ? value : most;
      least = value > -INF && value < least ? value : least;
      is_nan |= value != value;
    }
    if (is_nan || most > seen.most) seen.chunk = first / CHUNK;
    seen.has_nan = is_nan;
    if (is_nan) return seen;
    seen.most = std::max(seen.most, most);
    seen.least = std::min(seen.least, least);
  }
  return seen;
}

// The first of the largest; of a row that holds NaN the first NaN, as torch does.
template <class T>
int64_t argmax_of(const T* x, const Extremes& seen) {
  int64_t at = seen.chunk * CHUNK;
  while (seen.has_nan ? to_float(x[at]) == to_float(x[at]) : to_float(x[at]) != seen.most) ++at;
  return at;
}

// Of a chunk.
inline float highest(const float* scores) {
  float most = -INF;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < CHUNK; ++i) most = scores[i] > most ? scores[i] : most;
  return most;
}

// Scores to choose from: logits, or a list of scores (temperature 1).
template <class T>
struct Row {
  const T* x;
  int64_t size;
  float temperature;
  float top;  // the highest score of the vocabulary

  // The scores [first, first + N), behind the end minus infinity; returns how many there are.
  template <int64_t N = CHUNK>
  int64_t read(int64_t first, float* scores) const {
    const int64_t n = std::min(N, size - first);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) scores[i] = to_float(x[first + i]) / temperature;
    std::fill(scores + n, scores + N, -INF);
    return n;
  }

  void odds(const float* scores, float* out) const {
#pragma omp simd
    for (int64_t i = 0; i < CHUNK; ++i) out[i] = exp_or_zero(scores[i] - top);
  }
};

// How much of something: of a bin, or until a limit. A vector, so that one addition does for both.
typedef double Amount __attribute__((vector_size(16)));
constexpr int MASS = 0, COUNT = 1;

bool is_reached(Amount limit, Amount amount) {
  return amount[MASS] >= limit[MASS] || amount[COUNT] >= limit[COUNT];
}

// Scores of a range from high to low in bins of equal width.
struct Histogram {
  alignas(64) Amount bins[NUM_COPIES][NUM_BINS + 1];  // sums in the first copy
  std::vector<uint16_t> digits;  // the bin of each score
  float low;                     // the end of the range

  template <class T>
  void fill(const Row<T>& row, float high, float low) {
    alignas(64) float scores[CHUNK], odds[CHUNK];
    this->low = low;
    // Doubles: no two floats are too close to part.
    const double start = high, scale = high > low ? (NUM_BINS - 1) / (start - low) : 1.0;
    digits.resize(std::max<size_t>(digits.size(), row.size + CHUNK));
    std::fill_n(&bins[0][0], NUM_COPIES * (NUM_BINS + 1), Amount{});
    for (int64_t first = 0; first < row.size; first += CHUNK) {
      uint16_t* digit = digits.data() + first;
      row.read(first, scores);
#pragma omp simd
      for (int64_t i = 0; i < CHUNK; ++i) {
        const double at = (start - scores[i]) * scale;
        digit[i] = static_cast<uint16_t>(static_cast<int32_t>(at < NUM_BINS ? at : NUM_BINS));
      }
      row.odds(scores, odds);
      for (int64_t i = 0; i < CHUNK; i += NUM_COPIES) {
#pragma GCC unroll 4
        for (int c = 0; c < NUM_COPIES; ++c) bins[c][digit[i + c]] += Amount{odds[i + c], 1.0};
      }
    }
    for (int bin = 0; bin < NUM_BINS; ++bin) {
      for (int c = 1; c < NUM_COPIES; ++c) bins[0][bin] += bins[c][bin];
    }
  }

  // Put the scores of one bin into `out`, which may be where they come from; returns their number.
  template <class T>
  int64_t gather(const Row<T>& row, int bin, float* out) const {
    constexpr int64_t GROUP = 64;
    alignas(64) float scores[GROUP];
    int64_t size = 0;
    for (int64_t first = 0; first < row.size; first += GROUP) {
      const uint16_t* digit = digits.data() + first;
      uint16_t has_one = 0;
#pragma omp simd reduction(| : has_one)
      for (int64_t i = 0; i < GROUP; ++i) has_one |= digit[i] == bin;
      if (!has_one) continue;
      const int64_t n = row.template read<GROUP>(first, scores);
      for (int64_t i = 0; i < n; ++i) {
        out[size] = scores[i];
        size += digit[i] == bin;
      }
    }
    return size;
  }
};

// A thread's memory, used again from step to step: as long as its longest vocabulary.
struct Scratch {
  Histogram whole, part;       // of a row and of one of its bins
  std::vector<float> scores;   // of that bin
  std::vector<float> candidates;
  std::vector<float> maxima;   // of the chunks
  std::vector<double> masses;  // of the chunks
};

Scratch& scratch_of_thread() {
  thread_local Scratch scratch;
  return scratch;
}

// The last that is kept: of those of this score, the first `num_ties`.
struct Border {
  float score = -INF;
  double num_ties = std::numeric_limits<double>::infinity();
  double mass = 0;  // of all that is kept
};

// Narrow a row with its histogram down to where the limit is reached; everything if nowhere.
template <class T>
Border narrow(const Row<T>& row, const Histogram& histogram, Amount limit, Scratch& scratch) {
  Amount before{};
  int bin = 0;
  while (bin < NUM_BINS && !is_reached(limit, before + histogram.bins[0][bin])) {
    before += histogram.bins[0][bin++];
  }
  if (bin == NUM_BINS) return {.score = histogram.low, .mass = before[MASS]};
  float* scores = scratch.scores.data();
  const Row<float> rest{scores, histogram.gather(row, bin, scores), 1.0f, row.top};
  float high = -INF, low = INF;
#pragma omp simd reduction(max : high) reduction(min : low)
  for (int64_t i = 0; i < rest.size; ++i) {
    high = scores[i] > high ? scores[i] : high;
    low = scores[i] < low ? scores[i] : low;
  }
  limit -= before;
  Border border{high};
  if (high > low) {
    scratch.part.fill(rest, high, low);
    border = narrow(rest, scratch.part, limit, scratch);
  } else {
    const double odds = exp_or_zero(high - row.top);
    const double for_mass = odds > 0 ? std::ceil(limit[MASS] / odds) : INF;
    border.num_ties = std::max(1.0, std::min({limit[COUNT], for_mass, double(rest.size)}));
    border.mass = border.num_ties * odds;
  }
  border.mass += before[MASS];
  return border;
}

// What a row asks for, as `SampleSpec` names it.
struct Choice {
  double temperature;
  int64_t top_k;
  double top_p, min_p, uniform;
};

// The border of top-k, and of top-p within its mass; `low` is the least score that has odds.
template <class T>
Border border_of(const Row<T>& row, float low, double top_k, double top_p, Scratch& scratch) {
  scratch.scores.resize(std::max<size_t>(scratch.scores.size(), row.size));
  scratch.whole.fill(row, row.top, low);
  Amount limit{INF, top_k};
  const Border border = narrow(row, scratch.whole, limit, scratch);
  if (top_p >= 1) return border;
  limit[MASS] = top_p * border.mass;
  return narrow(row, scratch.whole, limit, scratch);
}

// Put the scores that can be among the k likeliest into scratch: as high as the k-th of the chunks'
// maxima, or higher. For a small k they are hardly more than k.
template <class T>
Row<float> gather_candidates(const Row<T>& row, float& low, int64_t top_k, Scratch& scratch) {
  alignas(64) float scores[CHUNK];
  auto& maxima = scratch.maxima;
  maxima.clear();
  for (int64_t first = 0; first < row.size; first += CHUNK) {
    row.read(first, scores);
    maxima.push_back(highest(scores));
  }
  auto& sorted = scratch.candidates;
  sorted = maxima;
  std::nth_element(sorted.begin(), sorted.begin() + top_k - 1, sorted.end(), std::greater<>());
  low = std::max(low, sorted[top_k - 1]);
  scratch.candidates.resize(row.size);
  float* out = scratch.candidates.data();
  int64_t size = 0;
  for (size_t chunk = 0; chunk < maxima.size(); ++chunk) {
    if (maxima[chunk] < low) continue;
    const int64_t n = row.read(static_cast<int64_t>(chunk) * CHUNK, scores);
    for (int64_t i = 0; i < n; ++i) {
      out[size] = scores[i];
      size += scores[i] >= low;
    }
  }
  return {out, size, 1.0f, row.top};
}

template <class T>
Border filter(const Row<T>& row, float least, const Choice& choice, Scratch& scratch) {
  const bool has_k = choice.top_k > 0 && choice.top_k < row.size;
  if (!has_k && choice.top_p >= 1) return {};
  float low = std::max(least, row.top + LEAST_EXPONENT);
  const double top_k = has_k ? static_cast<double>(choice.top_k) : INF;
  if (top_k * CHUNK >= static_cast<double>(row.size)) {
    return border_of(row, low, top_k, choice.top_p, scratch);
  }
  const Row<float> candidates = gather_candidates(row, low, choice.top_k, scratch);
  return border_of(candidates, low, top_k, choice.top_p, scratch);
}

// Id of the last tie that is kept.
template <class T>
int64_t last_tie(const Row<T>& row, const Border& border) {
  alignas(64) float scores[CHUNK];
  double left = border.num_ties;
  for (int64_t first = 0; first < row.size && left < INF; first += CHUNK) {
    const int64_t n = row.read(first, scores);
    int num = 0;
#pragma omp simd reduction(+ : num)
    for (int64_t i = 0; i < CHUNK; ++i) num += scores[i] == border.score;
    if (num < left) {
      left -= num;
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      if (scores[i] == border.score && --left <= 0) return first + i;
    }
  }
  return row.size;
}

// Draws from what is kept; -1 where there is nothing to draw.
template <class T>
int64_t draw(const Row<T>& row, const Border& border, const Choice& choice, Scratch& scratch) {
  alignas(64) float scores[CHUNK], odds[CHUNK];
  const int64_t tie = last_tie(row, border);
  const float min_p = static_cast<float>(choice.min_p);
  const auto read_odds = [&](int64_t first) {
    row.read(first, scores);
    if (highest(scores) < border.score) return false;
    row.odds(scores, odds);
    const int32_t num_ties = static_cast<int32_t>(std::clamp<int64_t>(tie + 1 - first, 0, CHUNK));
#pragma omp simd
    for (int32_t i = 0; i < CHUNK; ++i) {
      const bool is_kept = (scores[i] > border.score) | ((scores[i] == border.score) & (i < num_ties));
      odds[i] = is_kept & (odds[i] >= min_p) ? odds[i] : 0.0f;
    }
    return true;
  };
  double total = 0;
  scratch.masses.clear();
  for (int64_t first = 0; first < row.size; first += CHUNK) {
    double mass = 0;
    if (read_odds(first)) {
#pragma omp simd reduction(+ : mass)
      for (int64_t i = 0; i < CHUNK; ++i) mass += odds[i];
    }
    scratch.masses.push_back(mass);
    total += mass;
  }
  const double target = choice.uniform * total;
  double before = 0;
  for (size_t chunk = 0; chunk < scratch.masses.size(); before += scratch.masses[chunk++]) {
    if (!(before + scratch.masses[chunk] > target)) continue;
    const int64_t first = static_cast<int64_t>(chunk) * CHUNK;
    read_odds(first);
    int64_t last = -1;
    for (int64_t i = 0; i < CHUNK && !(last >= 0 && before > target); ++i) {
      before += odds[i];
      if (odds[i] > 0) last = first + i;
    }
    return last;
  }
  return -1;
}

template <class T>
int64_t choose(const T* x, int64_t size, const Choice& choice) {
  const Extremes seen = extremes(x, size);
  if (!(choice.temperature > 0) || seen.has_nan) return argmax_of(x, seen);
  const float temperature = static_cast<float>(choice.temperature);
  const Row<T> row{x, size, temperature, seen.most / temperature};
  Scratch& scratch = scratch_of_thread();
  const Border border = filter(row, seen.least / temperature, choice, scratch);
  const int64_t token = draw(row, border, choice, scratch);
  return token >= 0 ? token : argmax_of(x, seen);  // infinities leave no odds
}

template <class Choose>
Tensor for_each_row(const Tensor& logits_nV, at::IntArrayRef rows, const Choose& choose_one) {
  const int64_t num_rows = logits_nV.size(0), size = logits_nV.size(1), stride = logits_nV.stride(0);
  for (const int64_t row : rows) {
    TORCH_CHECK(0 <= row && row < num_rows, "sample: row ", row, " of ", num_rows);
  }
  const auto num = static_cast<int64_t>(rows.size());
  Tensor out = at::empty({num}, logits_nV.options().dtype(at::kLong));
  int64_t* tokens = out.mutable_data_ptr<int64_t>();
  const auto run = [&](const auto* logits) {
    at::parallel_for(0, num, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) tokens[i] = choose_one(logits + rows[i] * stride, size, i);
    });
  };
  if (logits_nV.scalar_type() == at::kFloat) run(logits_nV.const_data_ptr<float>());
  else run(logits_nV.const_data_ptr<at::BFloat16>());
  return out;
}

void check(const Tensor& logits_nV) {
  const auto dtype = logits_nV.scalar_type();
  TORCH_CHECK(logits_nV.dim() == 2 && logits_nV.stride(1) == 1 && logits_nV.size(1) > 0 &&
                  (dtype == at::kFloat || dtype == at::kBFloat16),
              "sample: logits [n, V], rows dense, float32 or bfloat16");
}

Tensor argmax(const Tensor& logits_nV) {
  check(logits_nV);
  std::vector<int64_t> rows(logits_nV.size(0));
  std::iota(rows.begin(), rows.end(), 0);
  return for_each_row(logits_nV, rows, [](const auto* x, int64_t size, int64_t) {
    return argmax_of(x, extremes(x, size));
  });
}

Tensor sample(const Tensor& logits_nV, at::IntArrayRef rows, at::ArrayRef<double> temperature,
              at::IntArrayRef top_k, at::ArrayRef<double> top_p, at::ArrayRef<double> min_p,
              at::ArrayRef<double> uniform) {
  check(logits_nV);
  const size_t num = rows.size();
  TORCH_CHECK(temperature.size() == num && top_k.size() == num && top_p.size() == num &&
                  min_p.size() == num && uniform.size() == num,
              "sample: one of each parameter per row");
  return for_each_row(logits_nV, rows, [&](const auto* x, int64_t size, int64_t i) {
    return choose(x, size, Choice{temperature[i], top_k[i], top_p[i], min_p[i], uniform[i]});
  });
}

}  // namespace
}  // namespace sluice

TORCH_LIBRARY_FRAGMENT(sluice, m) {
  m.def("argmax(Tensor logits_nV) -> Tensor", sluice::argmax);
  m.def("sample(Tensor logits_nV, int[] rows, float[] temperature, int[] top_k, float[] top_p, "
        "float[] min_p, float[] uniform) -> Tensor", sluice::sample);
}
