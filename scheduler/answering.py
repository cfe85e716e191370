"""The engine as the alignment pipeline uses it: answer a user turn, record what the target computed."""

from typing import cast

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM


class RecordingEngine:
    """Answers user turns through the serving engine; implements ``drafter.align.collect.AnswerEngine``."""

    def __init__(self, engine: AsyncLLM):
        self._engine = engine
        self._tokenizer = engine.get_tokenizer()

    async def user_turn(self, request_id: str, temperature: float, max_tokens: int, seed: int) -> str:
        """Let the target write a user's turn itself: the chat template up to where the user speaks, then sampling."""
        marker = "\x00"
        text = cast(
            str,
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": marker}], add_generation_prompt=False, tokenize=False
            ),
        )
        params = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, seed=seed, output_kind=RequestOutputKind.FINAL_ONLY
        )
        prefix = self._tokenizer.encode(text.split(marker)[0], add_special_tokens=False)
        written = ""
        async for output in self._engine.generate({"prompt_token_ids": prefix}, params, request_id):
            written = output.outputs[0].text
        return written

    async def answer(self, request_id: str, prompt: str, temperature: float, max_tokens: int) -> int:
        """Answer ``prompt`` as the only user turn of a chat; returns the number of tokens written.

        A prompt that leaves no room for an answer of ``max_tokens`` is passed over.
        """
        token_ids = cast(
            list[int],
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            ),
        )
        if len(token_ids) + max_tokens > self._engine.model_config.max_model_len:
            return 0
        params = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        written = 0
        async for output in self._engine.generate({"prompt_token_ids": token_ids}, params, request_id):
            written = len(output.outputs[0].token_ids)
        return written

    async def flush(self) -> None:
        """Make the recorder write its last shard."""
        await self._engine.collective_rpc("proposer_command", args=("flush", {}))
