from typing import Any

import pytest

from scheduler.draft_limit import DRAFT_LIMIT_KEY, requested_draft_limit

_NO_LIMITS: list[Any] = [None, True, False, -1, 3.0, float("nan"), "3", "", [2], {"a": 1}, [], {}]


@pytest.mark.parametrize("limit", [0, 1, 5, 2**63])
def test_a_whole_number_is_the_limit(limit: int) -> None:
    assert requested_draft_limit({"session_id": "a", DRAFT_LIMIT_KEY: limit}) == limit


@pytest.mark.parametrize("rubbish", _NO_LIMITS)
def test_anything_else_is_no_limit(rubbish: object) -> None:
    assert requested_draft_limit({DRAFT_LIMIT_KEY: rubbish}) is None


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 0}])
def test_most_requests_bring_nothing(extra_args: dict[str, Any] | None) -> None:
    assert requested_draft_limit(extra_args) is None
