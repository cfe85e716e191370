// Picking the tokens of draft blocks from left to right, each given those before it.
#pragma once

#include <optional>

#include "linear_call.h"
#include "ngrams.h"
#include "parallel.h"

namespace slipstream {

// What the target will draw its tokens with, see drafter/coupled.py. `seeds` is null where it draws nothing.
struct DrawArgs {
  const int64_t *seeds, *positions;  // [blocks]; positions are those of the first slots
  const double *temperatures, *shares;
};

struct WalkArgs {
  int64_t blocks, slots, vocab;  // vocab: rows of the draft head
  const float* logits;           // [blocks, slots, vocab]
  const int64_t* anchors;        // [blocks], the tokens before the first slots
  const int64_t* before;         // [blocks], the tokens before those; null where nobody saw them
  const int64_t* scopes;         // [blocks], or null
  const int64_t* ends;           // [blocks, num_ends] tokens that end a text, -1 for none
  int64_t num_ends;
  const int64_t* token_ids;  // [vocab] target ids of the draft head's rows; null if they are the same
  const int64_t* rows;       // [num_rows] the other way round, -1 where there is none, as for all ids behind the last
  int64_t num_rows;
  const float* previous;  // [target_vocab, markov.in]; null without a Markov head
  LayerWeight markov;
  NgramArgs ngrams;
  DrawArgs draws;
  int64_t target_vocab;  // no candidate may be as large
  int64_t count;         // of likely tokens that are considered: at most so many,
  float mass;            // and no more than reach this probability
  int64_t* tokens;       // [blocks, slots]
  float* probabilities;  // [blocks, slots]
};

// Returns nothing, or a candidate that is no token below `target_vocab`: then drafts are not to be used. A block's draft
// depends neither on the other blocks nor on threads.
std::optional<int64_t> walk_blocks(const WalkArgs& args, const ParallelFor& parallel_for);

}  // namespace slipstream
