import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafter.checkpoint import Drafter, save_drafter
from drafter.config import DrafterConfig
from drafter.errors import DrafterCheckpointError
from drafter.options import PathSearch, ProposalOptions
from drafter.proposer import BlockDiffusionProposer, up_to_end
from drafter.types import PagedCacheSpec
from tests.drafter.dense import dense_block
from tests.drafter.simulated_engine import SimulatedEngine, Work
from tests.drafter.tiny import (
    HEAD_DIM,
    KV_HEADS,
    dflash_config,
    random_drafter,
    random_target,
    shift_config,
    target_shape,
)

PROMPT = [5, 17, 30, 2, 9, 9, 21, 8, 33, 12]
CONFIGS = {"shift": shift_config(), "dflash": dflash_config(), "causal dflash": dflash_config(causal=True)}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> DrafterConfig:
    return CONFIGS[request.param]


def start(config: DrafterConfig, max_draft_tokens: int = 99) -> tuple[Drafter, SimulatedEngine]:
    """A drafter to compute with, and an engine that serves a copy of it: serving may rearrange its weights."""
    served = BlockDiffusionProposer(random_drafter(config), ProposalOptions(max_draft_tokens), "drafters/d")
    return random_drafter(config), SimulatedEngine(served)


@torch.inference_mode()
def fresh(drafter: Drafter, engine: SimulatedEngine, tokens: list[int]) -> tuple[list[int], list[float]]:
    """Drafts behind ``tokens`` and their survival, computed densely: no pages, no history."""
    model, config = drafter.model, drafter.model.config
    context, slots = len(tokens) - 1, config.block_size
    features, keys_values = dense_context(drafter, engine, tokens[:-1])

    def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, values = (
            torch.cat([cached, own[0]]).repeat_interleave(config.num_heads // KV_HEADS, dim=1)
            for cached, own in zip(keys_values[layer], (key, value), strict=True)
        )
        scores = torch.einsum("qhd,khd->hqk", query[0], keys) / math.sqrt(HEAD_DIM)
        if config.causal:
            later = torch.arange(slots)[None] > torch.arange(slots)[:, None]
            scores[:, :, context:] = scores[:, :, context:].masked_fill(later, -math.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)[None]

    anchor = torch.tensor(tokens[-1:])
    inputs = model.block_inputs(anchor, features[-1:], engine.target.embedding.float(), slots)
    hidden = model(inputs, torch.arange(context, context + slots)[None], attend)
    head = drafter.head(engine.target)
    path = head.walk(head.logits(hidden), anchor)
    return path.tokens[0].tolist(), path.survival[0].tolist()


def dense_context(
    drafter: Drafter, engine: SimulatedEngine, tokens: list[int]
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    states = engine.hidden_states(tokens)
    hidden = torch.cat([states[i] for i in drafter.model.config.hidden_state_layers], dim=-1)
    features = drafter.model.context_features(hidden)
    return features, drafter.model.context_kv(features, torch.arange(len(tokens)))


@torch.inference_mode()
def check(
    drafter: Drafter, engine: SimulatedEngine, proposed: dict[str, tuple[list[int], list[float]]], drafting: bool = True
) -> None:
    """Drafts and cached keys and values of every request equal a fresh computation."""
    engine.proposer.settle()
    for request_id, (token_ids, survival) in proposed.items():
        state = engine.requests[request_id]
        _, keys_values = dense_context(drafter, engine, state.tokens[: state.computed])
        where = torch.arange(state.computed)
        page = torch.tensor(state.pages)[where // engine.page_size]
        for pages, (key, value) in zip(engine.proposer.page_tensors(), keys_values, strict=True):
            torch.testing.assert_close(pages[page, 0, where % engine.page_size], key, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pages[page, 1, where % engine.page_size], value, rtol=1e-4, atol=1e-5)
        if drafting:
            expected_tokens, expected_survival = fresh(drafter, engine, state.tokens)
            assert token_ids == expected_tokens
            assert survival == pytest.approx(expected_survival, rel=1e-3)


def test_prefill_and_decode_with_accepted_and_rejected_drafts(config: DrafterConfig) -> None:
    drafter, engine = start(config)
    engine.add("a", PROMPT)
    proposed = engine.step({"a": Work(emitted=[7])})
    check(drafter, engine, proposed)
    for accepted in (0, 1, 2, 3, 0, 3):
        drafts = proposed["a"][0][:3]
        proposed = engine.step({"a": Work(drafts=drafts, emitted=[*drafts[:accepted], 30 + accepted])})
        check(drafter, engine, proposed)
    assert len(engine.requests["a"].tokens) == len(PROMPT) + 1 + 6 + 9


def test_decoding_without_drafts_keeps_the_cache_whole(config: DrafterConfig) -> None:
    drafter, engine = start(config)
    engine.add("a", PROMPT)
    engine.step({"a": Work(emitted=[7], limit=0)})
    for token in (8, 9, 10):
        engine.step({"a": Work(emitted=[token], limit=0)})
    check(drafter, engine, engine.step({"a": Work(emitted=[1])}))


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 4, 1], [3, 5, 1], [9]])
def test_chunked_prefill(config: DrafterConfig, chunks: list[int]) -> None:
    drafter, engine = start(config)
    engine.add("a", PROMPT)
    for chunk in chunks:
        proposed = engine.step({"a": Work(run=chunk)})
        assert proposed == {"a": ([], [])}
        check(drafter, engine, proposed, drafting=False)
    check(drafter, engine, engine.step({"a": Work(emitted=[7])}))


def test_a_prefix_hit_reads_pages_that_another_request_wrote(config: DrafterConfig) -> None:
    drafter, engine = start(config)
    engine.add("a", PROMPT)
    proposed = engine.step({"a": Work(emitted=[7])})
    engine.add("b", [*PROMPT[:8], 31, 32, 33], cached_from="a", cached=8)
    drafts = proposed["a"][0][:2]
    proposed = engine.step({"b": Work(emitted=[4]), "a": Work(drafts=drafts, emitted=[39])})
    assert engine.requests["b"].pages[:2] == engine.requests["a"].pages[:2]
    check(drafter, engine, proposed)


def test_a_prompt_cached_but_for_its_last_token(config: DrafterConfig) -> None:
    drafter, engine = start(config)
    engine.add("a", PROMPT)
    engine.step({"a": Work(emitted=[7])})
    engine.add("b", PROMPT[:9], cached_from="a", cached=8)
    check(drafter, engine, engine.step({"b": Work(emitted=[4])}))


def test_pages_of_an_ended_request_are_used_again(config: DrafterConfig) -> None:
    drafter, engine = start(config)
    engine.add("a", PROMPT)
    proposed = engine.step({"a": Work(emitted=[7])})
    engine.step({"a": Work(drafts=proposed["a"][0][:3], emitted=[1])})
    pages = engine.requests["a"].pages
    engine.end("a")
    engine.add("b", [1, 2, 3, 4, 5, 6])
    check(drafter, engine, engine.step({"b": Work(emitted=[7])}))
    assert set(engine.requests["b"].pages) <= set(pages)


def test_a_preempted_request_is_recomputed_into_other_pages(config: DrafterConfig) -> None:
    drafter, engine = start(config)
    engine.add("a", PROMPT)
    proposed = engine.step({"a": Work(emitted=[7])})
    drafts = proposed["a"][0][:3]
    engine.step({"a": Work(drafts=drafts, emitted=[*drafts[:2], 1])})
    tokens, pages = engine.requests["a"].tokens, engine.requests["a"].pages
    engine.end("a", finished=False)
    engine.add("b", PROMPT[::-1])
    engine.step({"b": Work(emitted=[3])})
    engine.add("a", tokens)
    proposed = engine.step({"a": Work(run=5), "b": Work(emitted=[4])})
    check(drafter, engine, {"b": proposed["b"]})
    check(drafter, engine, engine.step({"a": Work(emitted=[2]), "b": Work(emitted=[5])}))
    assert engine.requests["a"].pages != pages


def test_a_neighbour_that_cannot_use_drafts(config: DrafterConfig) -> None:
    drafter, engine = start(config)
    engine.add("a", PROMPT)
    engine.add("full", PROMPT[3:])
    proposed = engine.step({"full": Work(emitted=[6], limit=0), "a": Work(emitted=[7])})
    assert proposed["full"] == ([], [])
    check(drafter, engine, {"a": proposed["a"]})
    check(drafter, engine, {"full": proposed["full"]}, drafting=False)
    proposed = engine.step({"a": Work(emitted=[8], limit=0), "full": Work(emitted=[9])})
    check(drafter, engine, {"full": proposed["full"]})
    check(drafter, engine, {"a": proposed["a"]}, drafting=False)


def test_a_batch_drafts_what_each_request_alone_would(config: DrafterConfig) -> None:
    first = {"a": Work(emitted=[7]), "b": Work(run=3), "c": Work(emitted=[8])}
    second = {"c": Work(emitted=[9]), "b": Work(emitted=[1]), "a": Work(emitted=[2])}
    prompts = {"a": PROMPT, "b": PROMPT[::-1], "c": PROMPT[4:6]}
    _, together = start(config)
    for request_id, prompt in prompts.items():
        together.add(request_id, prompt)
    batched = [together.step(work) for work in (first, second)]
    for request_id, prompt in prompts.items():
        _, alone = start(config)
        alone.add(request_id, prompt)
        for work, expected in zip((first, second), batched, strict=True):
            token_ids, survival = alone.step({request_id: work[request_id]})[request_id]
            assert token_ids == expected[request_id][0]
            assert survival == pytest.approx(expected[request_id][1], rel=1e-4)


def test_limits_are_respected_request_by_request(config: DrafterConfig) -> None:
    limits = {"none": 0, "one": 1, "two": 2, "all": 99}
    drafter, engine = start(config)
    for i, request_id in enumerate(limits):
        engine.add(request_id, PROMPT[i:])
    work = {request_id: Work(emitted=[7], limit=limit) for request_id, limit in limits.items()}
    proposed = engine.step(work)
    for request_id, limit in limits.items():
        count = min(limit, config.num_draft_tokens)
        expected_tokens, expected_survival = fresh(drafter, engine, engine.requests[request_id].tokens)
        assert proposed[request_id][0] == expected_tokens[:count]
        assert proposed[request_id][1] == pytest.approx(expected_survival[:count], rel=1e-3)


@pytest.mark.parametrize("cap", [1, 2])
def test_a_capped_block_is_the_start_of_the_whole_one(config: DrafterConfig, cap: int) -> None:
    drafter, engine = start(config, cap)
    assert engine.proposer.max_draft_tokens == cap
    engine.add("a", PROMPT)
    token_ids, survival = engine.step({"a": Work(emitted=[7])})["a"]
    expected_tokens, expected_survival = fresh(drafter, engine, engine.requests["a"].tokens)
    assert token_ids == expected_tokens[:cap]
    assert survival == pytest.approx(expected_survival[:cap], rel=1e-3)


def test_a_prompt_of_one_token(config: DrafterConfig) -> None:
    drafter, engine = start(config)
    engine.add("a", [4])
    check(drafter, engine, engine.step({"a": Work(emitted=[7])}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_target_of_half_precision(config: DrafterConfig, dtype: torch.dtype) -> None:
    drafter = random_drafter(config)
    engine = SimulatedEngine(BlockDiffusionProposer(drafter, ProposalOptions(99), "d"), random_target(dtype=dtype))
    engine.add("a", PROMPT)
    forward = engine.forward({"a": Work(emitted=[7])})
    drafts = engine.proposer.propose(replace(forward, hidden_states=[h.to(dtype) for h in forward.hidden_states]))
    assert len(drafts.token_ids[0]) == config.num_draft_tokens


def counted(engine: SimulatedEngine) -> dict[str, int]:
    """The counters without those of time."""
    counters = engine.proposer.command("counters", {})
    return {name: value for name, value in counters.items() if not name.endswith("seconds")}


def test_counters_count_rows_blocks_and_drafts() -> None:
    _, engine = start(shift_config())
    engine.add("a", PROMPT)
    engine.add("b", PROMPT[:4])
    engine.step({"a": Work(run=3), "b": Work(emitted=[7], limit=2)})
    # Nothing was drafted for a, so its context can wait.
    assert counted(engine) == {"context_tokens": 4, "blocks": 1, "passes": 1, "draft_tokens": 2}
    engine.step({"a": Work(emitted=[7]), "b": Work(drafts=[1, 2], emitted=[3], limit=0)})
    assert counted(engine) == {"context_tokens": 14, "blocks": 2, "passes": 2, "draft_tokens": 6}
    engine.step({"b": Work(emitted=[7], limit=0)})
    assert counted(engine)["context_tokens"] == 14
    engine.proposer.settle()
    # Of b's three tokens two were rejected, one of which has been overwritten since.
    assert counted(engine) == {"context_tokens": 17, "blocks": 2, "passes": 2, "draft_tokens": 6}


def test_an_unknown_command_is_refused() -> None:
    _, engine = start(shift_config())
    with pytest.raises(ValueError, match="unknown command 'flush': the drafter knows 'counters'"):
        engine.proposer.command("flush", {})


def test_the_pages_cost_what_is_said() -> None:
    _, engine = start(shift_config())
    pages = engine.proposer.page_tensors()
    assert [tensor.shape for tensor in pages] == [(24, 2, 4, KV_HEADS, HEAD_DIM)] * 2
    assert sum(tensor.nbytes for tensor in pages) == 24 * 4 * engine.proposer.cache_bytes_per_token()


def test_a_drafter_for_another_target_is_refused() -> None:
    proposer = BlockDiffusionProposer(random_drafter(shift_config()), ProposalOptions(4), "drafters/d")
    target = replace(random_target(), shape=target_shape(hidden_size=32))
    with pytest.raises(DrafterCheckpointError, match="drafter drafters/d does not fit target models/tiny: hidden size"):
        proposer.attach(target, PagedCacheSpec(1, 1))


def test_a_checkpoint_proposes_what_the_drafter_does(tmp_path: Path) -> None:
    drafter = random_drafter(shift_config())
    save_drafter(drafter, tmp_path, torch.float32)
    proposer = BlockDiffusionProposer.from_checkpoint(tmp_path, ProposalOptions(max_draft_tokens=3))
    assert (proposer.max_draft_tokens, proposer.hidden_state_layers) == (3, (1, 3))
    engine = SimulatedEngine(proposer)
    engine.add("a", PROMPT)
    token_ids, _ = engine.step({"a": Work(emitted=[7])})["a"]
    assert token_ids == fresh(drafter, engine, engine.requests["a"].tokens)[0][:3]


REFINING = ProposalOptions(99, max_passes=3, observe_threshold=0.8)


@torch.inference_mode()
def refined(
    drafter: Drafter, engine: SimulatedEngine, tokens: list[int], options: ProposalOptions
) -> tuple[list[int], list[float], int]:
    """Drafts behind ``tokens``, their survival and the passes, every pass over the whole block and densely."""
    config, head = drafter.model.config, drafter.head(engine.target)
    features, _ = dense_context(drafter, engine, tokens[:-1])
    count, slots = config.num_draft_tokens, config.block_size
    held, fixed, order, passes = min(count, slots - 1), [-1] * count, [0], 0
    logits = torch.zeros(1, count, config.draft_vocab_size)
    while True:
        passes += 1
        inputs = [tokens[-1]] + [config.mask_token_id] * (slots - 1)
        for draft in range(held):
            if fixed[draft] >= 0:
                inputs[draft + 1] = fixed[draft]
        masked = [slot for slot in range(slots) if slot not in order]
        new = head.logits(dense_block(drafter.model, features, inputs, order + masked, engine.target.embedding))
        still_open = [draft for draft in range(count) if fixed[draft] < 0]
        logits[0, still_open] = new[still_open]
        path = head.walk(logits, torch.tensor(tokens[-1:]), torch.tensor([fixed]))
        newly = [d for d in still_open if d < held and path.probabilities[0, d] >= options.observe_threshold]
        for draft in newly:
            fixed[draft] = int(path.tokens[0, draft])
            order.append(draft + 1)
        if not newly or passes == options.max_passes or min(fixed) >= 0:
            return path.tokens[0].tolist(), path.survival[0].tolist(), passes


def test_refined_drafts_through_a_whole_request(config: DrafterConfig) -> None:
    proposer = BlockDiffusionProposer(random_drafter(config), REFINING, "d")
    drafter, engine = random_drafter(config), SimulatedEngine(proposer)
    engine.add("a", PROMPT)
    engine.add("b", PROMPT[3:7])
    proposed = engine.step({"a": Work(emitted=[7]), "b": Work(emitted=[2])})
    passes: list[int] = []
    for accepted in (None, 0, 2, 1, 3, 0):
        if accepted is not None:
            a, b = proposed["a"][0], proposed["b"][0]
            work = Work(drafts=a, emitted=[*a[:accepted], 30 + accepted])
            proposed = engine.step({"b": Work(drafts=b, emitted=[*b[: 3 - accepted], 11]), "a": work})
        for request_id, (token_ids, survival) in proposed.items():
            tokens, chances, count = refined(drafter, engine, engine.requests[request_id].tokens, REFINING)
            assert token_ids == tokens
            assert survival == pytest.approx(chances, rel=1e-3)
            passes.append(count)
    assert len(set(passes)) > 1, "every block took the same number of passes"
    assert counted(engine)["blocks"] == 12 and counted(engine)["passes"] == sum(passes)


def test_one_pass_is_one_pass_whatever_the_threshold(config: DrafterConfig) -> None:
    options = ProposalOptions(99, max_passes=1, observe_threshold=0.0, calibrated_threshold=True)
    drafter, engine = (
        random_drafter(config),
        SimulatedEngine(BlockDiffusionProposer(random_drafter(config), options, "d")),
    )
    engine.add("a", PROMPT)
    check(drafter, engine, engine.step({"a": Work(emitted=[7])}))
    assert counted(engine)["passes"] == counted(engine)["blocks"] == 1


def test_thresholds_are_taken_from_the_first_request_that_ends(config: DrafterConfig) -> None:
    options = ProposalOptions(99, max_passes=2, observe_threshold=2.0, calibrated_threshold=True)
    engine = SimulatedEngine(BlockDiffusionProposer(random_drafter(config), options, "d"))
    engine.add("a", PROMPT)
    first, _ = engine.step({"a": Work(emitted=[7])})["a"]
    engine.step({"a": Work(drafts=first, emitted=[first[0], first[1], 39])})
    assert counted(engine)["passes"] == counted(engine)["blocks"] == 2
    engine.end("a")
    # The same prompt again: its draft tokens are as probable as those that the target agreed with.
    engine.add("b", PROMPT)
    engine.step({"b": Work(emitted=[7])})
    assert counted(engine)["blocks"] == 3 and counted(engine)["passes"] == 4


def test_the_time_of_context_and_drafting_is_counted() -> None:
    _, engine = start(shift_config())
    engine.add("a", PROMPT)
    engine.step({"a": Work(run=3)})
    before = engine.proposer.command("counters", {})
    assert before["context_seconds"] > 0 and before["seconds"] >= 0
    engine.step({"a": Work(emitted=[7])})
    after = engine.proposer.command("counters", {})
    assert after["context_seconds"] > before["context_seconds"] and after["seconds"] > before["seconds"]


@pytest.mark.parametrize(("ends", "kept"), [(set(), 3), ({9}, 3), ({5}, 1), ({6}, 2), ({7, 6}, 2), ({7}, 3)])
def test_nothing_is_drafted_behind_an_end_token(ends: set[int], kept: int) -> None:
    assert up_to_end([5, 6, 7], ends) == kept
    assert up_to_end([], ends) == 0


@pytest.mark.parametrize("stop", [True, False])
def test_a_draft_stops_at_its_end_token_if_it_is_told_to(stop: bool) -> None:
    options = ProposalOptions(99, stop_at_end=stop)
    whole = first_draft(ProposalOptions(99))
    assert len(whole) == 4 and len(set(whole)) > 1
    end = whole[1] if whole[1] != whole[0] else next(token for token in whole if token != whole[0])
    cut = first_draft(options, ends=frozenset({end}))
    assert cut == (whole[: whole.index(end) + 1] if stop else whole)


def test_each_path_search_is_the_one_asked_for() -> None:
    independent, walk, beam = (first_draft(ProposalOptions(99, path=path)) for path in PathSearch)
    assert len(walk) == len(independent) == 4 and 1 <= len(beam) <= 4
    assert walk != independent
    plain = shift_config(markov_rank=0)
    drafts = [first_draft(ProposalOptions(99, path=path), config=plain) for path in PathSearch]
    assert drafts[0] == drafts[1]


def first_draft(
    options: ProposalOptions, ends: frozenset[int] = frozenset(), config: DrafterConfig | None = None
) -> list[int]:
    """What is drafted behind the prompt."""
    drafter = random_drafter(config or shift_config())
    if drafter.model.markov is not None:
        drafter.model.markov.logits.weight.data *= 10  # enough to change tokens
    engine = SimulatedEngine(BlockDiffusionProposer(drafter, options, "drafters/d"))
    engine.end_tokens = ends
    engine.add("a", PROMPT)
    return engine.step({"a": Work(emitted=[7])})["a"][0]
