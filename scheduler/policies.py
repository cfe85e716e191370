"""The policy that the options ask for, and what it keeps between starts; pure."""

import logging

from scheduler.adaptive import AdaptivePolicy
from scheduler.cost import CostModel, load_cost_model, save_cost_model
from scheduler.fixed_policies import FixedLength
from scheduler.options import PolicyName, PolicyOptions
from scheduler.policy import DraftPolicy, SurvivalFloor

_log = logging.getLogger(__name__)


def make_policy(options: PolicyOptions, slots: int, max_tokens: int) -> DraftPolicy:
    """Build it.

    Args:
        slots: longest draft.
        max_tokens: rows of the largest step.
    """
    match options.name:
        case PolicyName.FLOOR:
            return SurvivalFloor(options.survival_floor, slots)
        case PolicyName.FIXED:
            return FixedLength(slots)
    return AdaptivePolicy(slots, options.min_draft_tokens, _known_cost(options, max_tokens) or CostModel(max_tokens))


def keep_costs(options: PolicyOptions, policy: DraftPolicy | None) -> None:
    """Save what an adaptive policy knows of step times, if there is a place for it; failing that is only logged."""
    if options.cost_file is None or not isinstance(policy, AdaptivePolicy) or not policy.cost.observations:
        return
    try:
        save_cost_model(options.cost_file, options.cost_identity, policy.cost)
    except OSError as error:
        _log.warning("step times are not saved in %s: %s", options.cost_file, error.strerror)


def _known_cost(options: PolicyOptions, max_tokens: int) -> CostModel | None:
    if options.cost_file is None:
        return None
    model, why = load_cost_model(options.cost_file, options.cost_identity)
    _log.info(why)
    return model if model is not None and model.max_tokens == max_tokens else None
