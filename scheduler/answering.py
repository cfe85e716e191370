"""The engine as the alignment pipeline uses it: answer a conversation, record what the target computed."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import cast

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from drafter.align.collect import Written
from drafter.align.loops import loop_start
from drafter.align.prompts import Turn

_LOOKED_AT_EVERY = 16  # tokens, for loops


class RecordingEngine:
    """Answers conversations through the serving engine; implements ``drafter.align.collect.AnswerEngine``."""

    def __init__(self, engine: AsyncLLM):
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()

    async def user_turn(
        self, request_id: str, turns: Sequence[Turn], temperature: float, max_tokens: int, seed: int
    ) -> str:
        """Let the target write a user's turn itself: the chat template up to where the user speaks, then sampling.

        Where ``turns`` leave no room for it, it is empty.
        """
        marker = "\x00"
        text = cast(
            str,
            self._tokenizer.apply_chat_template(
                _messages([*turns, Turn("user", marker)]), add_generation_prompt=False, tokenize=False
            ),
        )
        prefix = self._tokenizer.encode(text.split(marker)[0], add_special_tokens=False)
        if not self._fits(prefix, max_tokens):
            return ""
        params = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY
        )
        written = ""
        async for output in self._engine.generate({"prompt_token_ids": prefix}, params, request_id):
            written = output.outputs[0].text
        return written

    async def answer(
        self, request_id: str, turns: Sequence[Turn], temperature: float, max_tokens: int, seed: int
    ) -> Written:
        """Answer a conversation; an answer that has begun to loop is broken off.

        One that leaves no room for an answer of ``max_tokens`` is passed over.
        """
        token_ids = cast(
            list[int],
            self._tokenizer.apply_chat_template(_messages(turns), add_generation_prompt=True, return_dict=False),
        )
        if not self._fits(token_ids, max_tokens):
            return Written("", 0)
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed if temperature > 0 else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        written: list[int] = []
        async with aclosing(self._engine.generate({"prompt_token_ids": token_ids}, params, request_id)) as outputs:
            async for output in outputs:
                written.extend(output.outputs[0].token_ids)
                if len(written) % _LOOKED_AT_EVERY == 0 and loop_start(written) is not None:
                    break
        return Written(self._tokenizer.decode(written, skip_special_tokens=True), len(written))

    async def flush(self) -> None:
        """Make the recorder write its last shard."""
        await self._engine.collective_rpc("proposer_command", args=("flush", {}))

    def _fits(self, token_ids: Sequence[int], max_tokens: int) -> bool:
        return len(token_ids) + max_tokens <= self._engine.model_config.max_model_len


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]
