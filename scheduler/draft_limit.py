"""The most draft tokens that a request asks for, as it travels in the request's sampling parameters; pure."""

from collections.abc import Mapping
from typing import Any

# Name in vLLM's ``vllm_xargs``, which the engine sees as ``SamplingParams.extra_args``.
DRAFT_LIMIT_KEY = "slipstream_max_draft_tokens"


def requested_draft_limit(extra_args: Mapping[str, Any] | None) -> int | None:
    """The most draft tokens of the request that may be verified in one step, ``None`` where it sets no limit.

    A client can write into ``extra_args`` what it likes, past the checks of ``speculation`` in the request's body.
    Whatever is not a whole number of at least 0 counts as no limit: it must not end the engine that all share.
    """
    value = extra_args.get(DRAFT_LIMIT_KEY) if extra_args else None
    return value if type(value) is int and value >= 0 else None


def draft_limit(extra_args: Mapping[str, Any] | None, slots: int) -> int:
    """The most draft tokens of the request that may be verified in one step, where nobody gets more than ``slots``."""
    requested = requested_draft_limit(extra_args)
    return slots if requested is None else min(requested, slots)
