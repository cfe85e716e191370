// Reading the n-gram counts of drafter/ngram.py where they lie. Hashes and layout are those of HashedNgrams.
#pragma once

#include <algorithm>
#include <cstdint>

namespace slipstream {

inline constexpr int64_t kWays = 4;    // cells of a bucket
inline constexpr int64_t kLevels = 4;  // shared bigrams and trigrams, then those of a scope

struct NgramArgs {
  const uint64_t* cells;  // [buckets, kWays], a tag of 32 bits above the count; null where there is no model
  const int32_t* values;  // [buckets, kWays]
  int64_t buckets;        // a power of two
  const int32_t* unigrams;
  const float* concentrations;  // [kLevels]
  float text;                   // the weight of all unigrams
};

// What is known of the two tokens before a slot.
struct NgramHistory {
  int64_t levels;  // that are interpolated
  uint64_t keys[kLevels];
  float totals[kLevels], shares[kLevels];
  float rest;  // what is left for unigrams
  int64_t successors[kLevels / 2];
};

class NgramReader {
 public:
  explicit NgramReader(const NgramArgs& args) : a_(args), mask_(uint64_t(args.buckets) - 1) {}

  // With `scope` null by the shared counts alone.
  NgramHistory history(int64_t before, int64_t last, const int64_t* scope) const {
    NgramHistory found{};
    found.levels = scope ? kLevels : kLevels / 2;
    for (int64_t level = 0; level < found.levels; ++level) {
      const bool pair = level % 2 == 1;
      uint64_t key = uint64_t(last) * 0x165667B19E3779F9;
      key += pair ? uint64_t(before) * 0xC2B2AE3D27D4EB4F : 0xA0761D6478BD642F;
      if (level >= kLevels / 2) key += uint64_t(*scope) * 0x9E3779B97F4A7C15;
      found.keys[level] = mixed(key);
      fetch(found.keys[level]);
    }
    for (int64_t level = 0; level < found.levels; ++level) {
      int32_t successor = 0;
      found.totals[level] = count(found.keys[level], &successor);
      if (level % 2 == 1) found.successors[level / 2] = int64_t(successor) - 1;
    }
    // Every level leaves part of its probability to the level below it, which all lower levels are multiplied by.
    float left = 1.0f;
    for (int64_t level = found.levels - 1; level >= 0; --level) {
      const float prior = a_.concentrations[level];
      left *= prior * (1.0f / (found.totals[level] + prior));
      found.shares[level] = left / prior;
    }
    found.rest = left;
    return found;
  }

  // Brings what probability() will read of a token into the cache.
  void fetch(const NgramHistory& history, int64_t token) const {
    for (int64_t level = 0; level < history.levels; ++level) {
      if (history.totals[level] > 0) fetch(continued(history.keys[level], token));
    }
    __builtin_prefetch(a_.unigrams + token);
  }

  float probability(const NgramHistory& history, int64_t token) const {
    float seen = 0.0f;
    for (int64_t level = 0; level < history.levels; ++level) {
      // A history may have been forgotten while a continuation of it was not.
      if (!(history.totals[level] > 0)) continue;
      const float counted = count(continued(history.keys[level], token), nullptr);
      seen += std::min(counted, history.totals[level]) * history.shares[level];
    }
    return (float(a_.unigrams[token]) + 0.5f) * (history.rest / a_.text) + seen;
  }

 private:
  static uint64_t mixed(uint64_t key) {
    key = (key ^ key >> 32) * 0xE7037ED1A0B428DB;
    return key ^ key >> 32;
  }

  static uint64_t continued(uint64_t history, int64_t token) {
    return history + uint64_t(token + 1) * 0xD6E8FEB86659FD93;
  }

  void fetch(uint64_t key) const { __builtin_prefetch(a_.cells + int64_t(key & mask_) * kWays); }

  float count(uint64_t key, int32_t* value) const {
    const int64_t bucket = int64_t(key & mask_) * kWays;
    for (int64_t way = bucket; way < bucket + kWays; ++way) {
      const uint64_t cell = a_.cells[way];
      if (cell >> 32 != key >> 32 || uint32_t(cell) == 0) continue;
      if (value) *value = a_.values[way];
      return float(uint32_t(cell));
    }
    return 0.0f;
  }

  const NgramArgs& a_;
  uint64_t mask_;
};

}  // namespace slipstream
