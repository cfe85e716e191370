"""vLLM's n-gram matcher, made ready in the background."""

import threading

import numpy as np

from scheduler.repetition import Matcher, Tokens


class NgramMatcher:
    """vLLM compiles its matcher when it is called first, which takes seconds: that happens beside the serving.

    Calling gives the matcher, or ``None`` until it is ready.
    """

    def __init__(self) -> None:
        self._matcher: Matcher | None = None
        self._thread = threading.Thread(target=self._compile, name="n-gram matcher", daemon=True)
        self._thread.start()

    def __call__(self) -> Matcher | None:
        return self._matcher

    def wait(self) -> Matcher:
        """The matcher, once it is ready.

        Raises:
            RuntimeError: it could not be made ready.
        """
        self._thread.join()
        if self._matcher is None:
            raise RuntimeError("vLLM's n-gram matcher could not be compiled")
        return self._matcher

    def _compile(self) -> None:
        from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find

        def match(text: Tokens, shortest: int, longest: int, count: int) -> Tokens:
            # It drafts no further than to a longest text, which is the caller's matter here.
            found: Tokens = find(text, shortest, longest, len(text) + count, count)
            return found

        match(np.zeros(4, dtype=np.int32), 1, 2, 1)
        self._matcher = match
