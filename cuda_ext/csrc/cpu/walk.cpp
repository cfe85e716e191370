#include "walk.h"

#include <cmath>
#include <vector>

#include "dispatch.h"

namespace slipstream {
namespace {

// splitmix64's finaliser and the noise that rests on it, bit for bit those of drafter/noise.py.
constexpr uint64_t kWeyl = 0x9E3779B97F4A7C15;

uint64_t finalised(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

double gumbel_noise(uint64_t key, int64_t token) {
  const uint64_t bits = finalised(key + uint64_t(token + 1) * kWeyl);
  return -std::log(-std::log((double(bits >> 12) + 0.5) * 0x1p-52));
}

// How far a block has come.
struct Progress {
  int64_t before, last;
  float value = 0.0f;  // tokens accepted on expectation
  float reach = 1.0f;  // the probability that all so far are
};

// Tokens that may stand in a slot.
struct Candidates {
  std::vector<int64_t> tokens;
  std::vector<float> chances;
  std::vector<double> scores;
  std::vector<float> logits;  // room for one row
  int64_t count;

  void reserve(const WalkArgs& a) {
    const size_t most = size_t(a.count + a.num_ends + kLevels / 2);
    if (tokens.size() < most) {
      tokens.resize(most);
      chances.resize(most);
      scores.resize(most);
    }
    if (logits.size() < size_t(a.vocab)) logits.resize(size_t(a.vocab));
  }

  bool holds(int64_t token) const {
    for (int64_t i = 0; i < count; ++i) {
      if (tokens[size_t(i)] == token) return true;
    }
    return false;
  }

  void add(int64_t token, float chance) {
    tokens[size_t(count)] = token;
    chances[size_t(count++)] = chance;
  }
};

// The walk through one block.
class BlockWalk {
 public:
  BlockWalk(const WalkArgs& args, int64_t block, const Progress& progress, Candidates& candidates)
      : a_(args), block_(block), progress_(progress), c_(candidates) {
    c_.reserve(a_);
  }

  // Fills `slot`, with `bias` [vocab] on the logits unless it is null. Returns what walk_blocks does.
  std::optional<int64_t> fill(int64_t slot, const float* bias, Progress* next, bool* ended) {
    const float* const logits = a_.logits + (block_ * a_.slots + slot) * a_.vocab;
    const float log_sum = take_likely(logits, bias);
    NgramHistory history{};
    const NgramReader ngrams(a_.ngrams);
    if (a_.ngrams.cells) {
      history = ngrams.history(progress_.before, progress_.last, a_.scopes ? a_.scopes + block_ : nullptr);
    }
    for (int64_t e = 0; e < a_.num_ends; ++e) take(ends()[e], logits, bias, log_sum);
    for (int64_t s = 0; s < history.levels / 2; ++s) take(history.successors[s], logits, bias, log_sum);
    for (int64_t i = 0; i < c_.count; ++i) {
      const int64_t token = c_.tokens[size_t(i)];
      if (token < 0 || token >= a_.target_vocab) return token;
    }
    if (a_.ngrams.cells) pool(ngrams, history);
    if (a_.draws.seeds) draw(slot);
    pick(slot, next, ended);
    return std::nullopt;
  }

 private:
  const int64_t* ends() const { return a_.ends + block_ * a_.num_ends; }

  int64_t token_of(int64_t row) const {
    if (row < 0) row = a_.vocab - 1;  // fewer tokens than are wanted have a probability: this one's is 0
    return a_.token_ids ? a_.token_ids[row] : row;
  }

  int64_t row_of(int64_t token) const {
    const int64_t row = a_.rows ? a_.rows[std::min(token, a_.num_rows - 1)] : token;
    return row < a_.vocab ? row : -1;
  }

  // The drafter's likely tokens; returns the logarithm of the sum of exponentials.
  float take_likely(const float* logits, const float* bias) {
    float log_sum;
    LikelyArgs args{};
    args.logits = logits;
    args.bias = bias;
    args.vocab = a_.vocab;
    args.count = a_.count;
    args.probabilities = c_.chances.data();
    args.tokens = c_.tokens.data();
    args.log_sum = &log_sum;
    kernels().likely(args, c_.logits.data());
    float sum = 0.0f;
    c_.count = 0;
    for (int64_t i = 0; i < a_.count; ++i) {
      const float chance = c_.chances[size_t(i)];
      sum += chance;
      if (i > 0 && !(sum - chance < a_.mass)) break;
      c_.add(token_of(c_.tokens[size_t(i)]), chance);
    }
    return log_sum;
  }

  // One more candidate, unless it is no token or known already.
  void take(int64_t token, const float* logits, const float* bias, float log_sum) {
    if (token < 0 || c_.holds(token)) return;
    const int64_t row = row_of(token);
    c_.add(token, row < 0 ? 0.0f : std::exp((logits[row] - log_sum) + (bias ? bias[row] : 0.0f)));
  }

  // The probability by two models that partly know the same, see _pooled in drafter/path.py.
  void pool(const NgramReader& ngrams, const NgramHistory& history) {
    for (int64_t i = 0; i < c_.count; ++i) ngrams.fetch(history, c_.tokens[size_t(i)]);
    for (int64_t i = 0; i < c_.count; ++i) {
      const float mine = c_.chances[size_t(i)], other = ngrams.probability(history, c_.tokens[size_t(i)]);
      const float average = 0.5f * (mine + other), either = mine + other - mine * other;
      c_.chances[size_t(i)] = 0.5f * (average + either);
    }
  }

  // The probability that the target draws each, see Draws.agreement in drafter/coupled.py.
  void draw(int64_t slot) {
    const DrawArgs& draws = a_.draws;
    const uint64_t seed = finalised(uint64_t(draws.seeds[block_]) + kWeyl);
    const uint64_t key = finalised(seed + uint64_t(draws.positions[block_] + slot) * kWeyl);
    double highest = -INFINITY, sum = 0.0;
    for (int64_t i = 0; i < c_.count; ++i) {
      const double logarithm = std::log(std::max(c_.chances[size_t(i)], 1e-30f));
      c_.scores[size_t(i)] = logarithm / draws.temperatures[block_] + gumbel_noise(key, c_.tokens[size_t(i)]);
      highest = std::max(highest, c_.scores[size_t(i)]);
    }
    for (int64_t i = 0; i < c_.count; ++i) sum += c_.scores[size_t(i)] = std::exp(c_.scores[size_t(i)] - highest);
    const double share = draws.shares[block_];
    for (int64_t i = 0; i < c_.count; ++i) {
      float& chance = c_.chances[size_t(i)];
      chance = float((1.0 - share) * double(chance) + share * (c_.scores[size_t(i)] / sum));
    }
  }

  // The candidate with which most tokens are accepted on expectation; of equal ones the first.
  void pick(int64_t slot, Progress* next, bool* ended) const {
    int64_t best = 0;
    float value = progress_.value + progress_.reach * c_.chances[0];
    for (int64_t i = 1; i < c_.count; ++i) {
      const float other = progress_.value + progress_.reach * c_.chances[size_t(i)];
      if (other > value) {
        best = i;
        value = other;
      }
    }
    const int64_t token = c_.tokens[size_t(best)];
    const float chance = c_.chances[size_t(best)];
    a_.tokens[block_ * a_.slots + slot] = token;
    a_.probabilities[block_ * a_.slots + slot] = chance;
    *next = {progress_.last, token, value, progress_.reach * chance};
    *ended = std::find(ends(), ends() + a_.num_ends, token) != ends() + a_.num_ends;
  }

  const WalkArgs& a_;
  const int64_t block_;
  const Progress progress_;
  Candidates& c_;
};

// Behind the end of a text, slots repeat it.
void repeat(const WalkArgs& a, int64_t block, int64_t slot, int64_t token) {
  for (int64_t s = slot; s < a.slots; ++s) {
    a.tokens[block * a.slots + s] = token;
    a.probabilities[block * a.slots + s] = 0.0f;
  }
}

}  // namespace

std::optional<int64_t> walk_blocks(const WalkArgs& a, const ParallelFor& parallel_for) {
  constexpr int64_t kBlocksPerThread = 2;
  std::vector<Progress> progress;
  std::vector<int64_t> walking;
  for (int64_t b = 0; b < a.blocks; ++b) {
    progress.push_back({a.before ? a.before[b] : -1, a.anchors[b]});
    walking.push_back(b);
  }
  thread_local std::vector<float> memory;  // of the calling thread: others get at it by pointers
  const int64_t rank = a.previous ? a.markov.in : 0, width = a.previous ? a.vocab : 0;
  if (memory.size() < size_t(a.blocks * (rank + width))) memory.resize(size_t(a.blocks * (rank + width)));
  float *const inputs = memory.data(), *const biases = inputs + a.blocks * rank;
  std::vector<char> ended(size_t(a.blocks), 0);
  std::vector<std::optional<int64_t>> unknown(size_t(a.blocks));
  for (int64_t slot = 0; slot < a.slots && !walking.empty(); ++slot) {
    const int64_t count = int64_t(walking.size());
    if (a.previous) {
      for (int64_t i = 0; i < count; ++i) {
        const float* const row = a.previous + progress[size_t(walking[size_t(i)])].last * rank;
        std::copy(row, row + rank, inputs + i * rank);
      }
      run_linear(a.markov, inputs, count, biases, parallel_for);
    }
    parallel_for(count, kBlocksPerThread, [&](int64_t begin, int64_t end) {
      thread_local Candidates candidates;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = walking[size_t(i)];
        Progress next{};
        bool over = false;
        const float* const bias = a.previous ? biases + i * width : nullptr;
        unknown[size_t(b)] = BlockWalk(a, b, progress[size_t(b)], candidates).fill(slot, bias, &next, &over);
        progress[size_t(b)] = next;
        if ((ended[size_t(b)] = over)) repeat(a, b, slot + 1, next.last);
      }
    });
    for (const std::optional<int64_t>& token : unknown) {
      if (token) return token;
    }
    std::erase_if(walking, [&](int64_t b) { return ended[size_t(b)] != 0; });
  }
  return std::nullopt;
}

}  // namespace slipstream
