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
        prefix = self._before_user(turns)
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
        token_ids = self._before_assistant(turns)
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
        kept = written[: loop_start(written)]  # as the recorder keeps it
        return Written(self._tokenizer.decode(kept, skip_special_tokens=True), len(kept))

    async def flush(self) -> None:
        """Make the recorder write its last shard."""
        await self._engine.collective_rpc("proposer_command", args=("flush", {}))

    def _before_user(self, turns: Sequence[Turn]) -> list[int]:
        """The conversation up to where the user speaks."""
        if not self._chats:
            return self._encoded("".join(f"{turn.text}\n\n" for turn in turns), begins=True)
        marker = "\x00"
        text = self._tokenizer.apply_chat_template(
            _messages([*turns, Turn("user", marker)]), add_generation_prompt=False, tokenize=False
        )
        return self._encoded(cast(str, text).split(marker)[0], begins=False)

    def _before_assistant(self, turns: Sequence[Turn]) -> list[int]:
        """The conversation up to where the assistant speaks."""
        if not self._chats:
            return self._encoded("\n\n".join(turn.text for turn in turns), begins=True)
        token_ids = self._tokenizer.apply_chat_template(_messages(turns), add_generation_prompt=True, return_dict=False)
        return cast(list[int], token_ids)

    def _encoded(self, text: str, *, begins: bool) -> list[int]:
        """Its tokens, with those that begin every text if wanted, and at least one."""
        token_ids = self._tokenizer.encode(text, add_special_tokens=begins)
        return token_ids or [self._tokenizer.eos_token_id]

    @property
    def _chats(self) -> bool:
        """Whether the target has a chat template; others just go on with a text, and turns are its paragraphs."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    def _fits(self, token_ids: Sequence[int], max_tokens: int) -> bool:
        return len(token_ids) + max_tokens <= self._engine.model_config.max_model_len


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]
