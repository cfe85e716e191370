"""What can be chosen of an alignment; cheap to import."""

from enum import StrEnum


class Objective(StrEnum):
    """How slots are weighed and what is asked of them.

    ``FALLING``: target's most likely token and distribution, weights falling with the slot (DFlash, arXiv 2602.06036).
    ``EXPECTED``: the same, each slot weighed by the tokens that hang on it, as the drafter stands (D-PACE).
    ``STREAK``: the expected number of tokens accepted in a row itself (SpecDiff-2, arXiv 2511.00606), beside the
    target's distribution. ``OVERLAP``: what both distributions have in common (DSpark, arXiv 2607.05147).
    """

    FALLING = "falling"
    EXPECTED = "expected"
    STREAK = "streak"
    OVERLAP = "overlap"
