"""How draft tokens are chosen. The defaults here are the plainest; those that measured best are the settings'."""

from dataclasses import dataclass
from enum import StrEnum


class PathSearch(StrEnum):
    """How one token per slot is picked from the block's distributions.

    ``INDEPENDENT``: each slot's most likely token. ``WALK``: left to right, each slot corrected by the token picked
    before it with the checkpoint's Markov head; without one it is the same as ``INDEPENDENT``. ``BEAM``: the best
    path through the most likely tokens of all slots, scored by the slots, the Markov head if there is one, and an
    n-gram model of the text seen so far (DiffuSpec's causal-consistency path search, arXiv 2510.02358).
    """

    INDEPENDENT = "independent"
    WALK = "walk"
    BEAM = "beam"


@dataclass(frozen=True, slots=True)
class ProposalOptions:
    """Attributes:
    max_draft_tokens: longest draft; a checkpoint's block may be shorter.
    path: see ``PathSearch``.
    beam_width: paths that ``BEAM`` keeps; of coupled drafts one.
    max_passes: passes over a block; from the second on, confident slots are observed and the others predicted
        again given them.
    observe_threshold: probability from which a slot counts as observed.
    calibrated_threshold: take the thresholds from the first sequence served instead, and keep them (OSDT,
        arXiv 2511.02077).
    stop_at_end: draft nothing behind an end-of-text token.
    coupled_sampling: above temperature 0, draft with the very noise that the target will draw its tokens with.
    """

    max_draft_tokens: int
    path: PathSearch = PathSearch.WALK
    beam_width: int = 3
    max_passes: int = 1
    observe_threshold: float = 0.9
    calibrated_threshold: bool = False
    stop_at_end: bool = True
    coupled_sampling: bool = True
