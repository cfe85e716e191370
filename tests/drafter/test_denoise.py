"""Passes that keep what is final against blocks computed densely and as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from drafter.config import DrafterConfig
from drafter.denoise import BlockStarts, Denoised, denoise
from drafter.layers import BlockContext, BlockRows
from drafter.refine import MASKED, BlockShape
from drafter.serving import ServingDrafter
from drafter.thresholds import FixedThreshold, Thresholds
from drafter.types import DraftPath, PagedCacheSpec
from tests.drafter.dense import dense_block
from tests.drafter.tiny import dflash_config, random_drafter, random_target, shift_config

CONFIGS = {"shift": shift_config(), "causal dflash": dflash_config(causal=True), "dflash": dflash_config()}
EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PAGE_SIZE, PAGES = 4, 4
LENGTHS = {"a": 5, "b": 1, "c": 11, "d": 8}
ANCHORS = {"a": 7, "b": 30, "c": 2, "d": 19}
NEVER, ALWAYS = FixedThreshold(2.0), FixedThreshold(0.0)


@dataclass(frozen=True)
class Script:
    """Thresholds that let chosen draft tokens through: by pass and request."""

    chosen: Mapping[tuple[int, str], Sequence[int]]

    def at(self, pass_number: int, request_ids: Sequence[str], drafts: int) -> torch.Tensor:
        result = torch.full((len(request_ids), drafts), 2.0)
        for row, request_id in enumerate(request_ids):
            result[row, [d for d in self.chosen.get((pass_number, request_id), ()) if d < drafts]] = 0.0
        return result


@dataclass
class Bench:
    """A drafter that serves, the same one to compute densely with, and what was seen of its passes."""

    config: DrafterConfig
    requests: list[str] = field(default_factory=lambda: list(LENGTHS))
    logits: list[torch.Tensor] = field(default_factory=list)
    fixed: list[torch.Tensor] = field(default_factory=list)
    rows: list[BlockRows] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.drafter, self.target = random_drafter(self.config), random_target()
        self.serving = ServingDrafter(random_drafter(self.config), self.target, PagedCacheSpec(16, PAGE_SIZE))
        for pages in self.serving.pages:
            pages.fill_(torch.nan)
        names = list(LENGTHS)
        self.features = {}
        tables = torch.arange(len(names) * PAGES, dtype=torch.int32).view(len(names), PAGES)
        for index, (name, length) in enumerate(LENGTHS.items()):
            generator = torch.Generator().manual_seed(index)
            features = self.serving.context_features(torch.randn(length, self.config.feature_size, generator=generator))
            self.features[name] = features
            where = torch.arange(length) + index * PAGES * PAGE_SIZE
            self.serving.write_context(features, torch.arange(length), where)
        chosen = torch.tensor([names.index(name) for name in self.requests])
        self.starts = BlockStarts(
            request_ids=self.requests,
            anchors=torch.tensor([ANCHORS[name] for name in self.requests]),
            last_features=torch.stack([self.features[name][-1] for name in self.requests]),
            context=BlockContext(tables[chosen], torch.tensor([LENGTHS[n] for n in self.requests], dtype=torch.int32)),
        )
        run = self.serving.run

        def watched(inputs: torch.Tensor, rows: BlockRows, *rest: Any) -> torch.Tensor:
            self.rows.append(rows)
            return run(inputs, rows, *rest)

        self.serving.run = watched  # type: ignore[assignment, method-assign]

    def denoise(self, thresholds: Thresholds, max_passes: int, drafts: int | None = None) -> Denoised:
        def search(logits: torch.Tensor, anchors: torch.Tensor, fixed: torch.Tensor | None) -> DraftPath:
            self.logits.append(logits.clone())
            self.fixed.append(torch.full(logits.shape[:2], -1) if fixed is None else fixed.clone())
            return self.serving.head.walk(logits, anchors, fixed)

        wanted = drafts or self.config.num_draft_tokens
        return denoise(self.serving, self.starts, wanted, search, thresholds, max_passes)

    def dense_logits(self, name: str, fixed: Sequence[int], observed_at: Sequence[int]) -> torch.Tensor:
        """Logits of all draft tokens of one block computed as a whole, in its physical order."""
        tokens = [self.config.mask_token_id] * len(observed_at)
        tokens[0] = ANCHORS[name]
        for draft, token in enumerate(fixed):
            if token >= 0:
                tokens[draft + 1] = token
        order = sorted(range(len(observed_at)), key=lambda slot: observed_at[slot])
        embedding = self.target.embedding
        hidden = dense_block(self.drafter.model, self.features[name], tokens, order, embedding)
        return self.drafter.head(self.target).logits(hidden)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> DrafterConfig:
    return CONFIGS[request.param]


def random_script(config: DrafterConfig, seed: int) -> Script:
    """Each pass lets about a third of the draft tokens through."""
    generator = torch.Generator().manual_seed(seed)
    return Script(
        {
            (number, name): torch.nonzero(torch.rand(config.num_draft_tokens, generator=generator) < 0.35)[
                :, 0
            ].tolist()
            for number in range(1, 5)
            for name in LENGTHS
        }
    )


@pytest.mark.parametrize("seed", range(8))
@torch.inference_mode()
def test_every_pass_predicts_what_the_whole_block_would(config: DrafterConfig, seed: int) -> None:
    bench, script = Bench(config), random_script(config, seed)
    shape = BlockShape.of(config, config.num_draft_tokens)
    result = bench.denoise(script, max_passes=4)
    passes = dict(zip(LENGTHS, result.passes.tolist(), strict=True))
    for row, name in enumerate(LENGTHS):
        observed_at = [0] + [MASKED] * (config.block_size - 1)
        fixed = [-1] * config.num_draft_tokens
        for number in range(1, passes[name] + 1):
            path, predicted = result.trace[number - 1]
            assert predicted[row].tolist() == [token < 0 for token in fixed]
            dense = bench.dense_logits(name, fixed, observed_at)
            for draft, token in enumerate(fixed):
                if token < 0:
                    logits = bench.logits[number - 1][row, draft]
                    torch.testing.assert_close(logits, dense[draft], rtol=1e-5, atol=1e-5)
                else:
                    assert path.tokens[row, draft] == token
                    assert torch.equal(bench.logits[number - 1][row, draft], bench.logits[number - 2][row, draft])
            assert bench.fixed[number - 1][row].tolist() == fixed
            for draft in script.chosen[number, name]:
                if draft < shape.held and fixed[draft] < 0:
                    observed_at[draft + 1], fixed[draft] = number, int(path.tokens[row, draft])
        # A block that has dropped out keeps its draft.
        last, _ = result.trace[passes[name] - 1]
        assert torch.equal(result.path.tokens[row], last.tokens[row])
        assert torch.equal(result.path.probabilities[row], last.probabilities[row])


@torch.inference_mode()
def test_refinement_changes_predictions(config: DrafterConfig) -> None:
    """Otherwise the comparisons here would show nothing."""
    bench = Bench(config)
    bench.denoise(Script({(1, "a"): [1], (1, "c"): [0]}), max_passes=2)
    first, second = bench.logits
    difference = (first - second).abs().amax(dim=2)
    assert float(difference[[0, 2], [2, 2]].min()) > 1e-3
    # "b" and "d" did not take part; the shift scheme's anchor, which predicts draft token 0, sees only itself.
    assert float(difference[[1, 3]].max()) == 0
    assert (float(difference[0, 0]) == 0) == (config is CONFIGS["shift"])


@pytest.mark.parametrize("name", LENGTHS)
@torch.inference_mode()
def test_a_batch_drafts_what_each_request_alone_would(config: DrafterConfig, name: str) -> None:
    script = random_script(config, 3)
    together, alone = Bench(config), Bench(config, [name])
    expected, actual = alone.denoise(script, 4), together.denoise(script, 4)
    row = list(LENGTHS).index(name)
    assert actual.path.tokens[row].tolist() == expected.path.tokens[0].tolist()
    torch.testing.assert_close(actual.path.probabilities[row], expected.path.probabilities[0], rtol=1e-4, atol=1e-6)
    assert actual.passes[row] == expected.passes[0]


@pytest.mark.parametrize("config", [CONFIGS["shift"], CONFIGS["causal dflash"]], ids=["shift", "causal dflash"])
@torch.inference_mode()
def test_final_slots_and_finished_blocks_are_not_run_again(config: DrafterConfig) -> None:
    bench = Bench(config)
    script = Script({(1, "a"): [0, 1], (1, "c"): [1], (1, "d"): [0], (2, "a"): [2], (2, "c"): [0]})
    result = bench.denoise(script, max_passes=4)
    second = [[1, 2, 3]] * 3
    # In the third pass "a" has three final slots and "c" two, unless "a" is done: DFlash's third was its last.
    third = [[3, -1], [2, 3]] if config is CONFIGS["shift"] else [[2, 3]]
    assert [rows.places.tolist() for rows in bench.rows] == [[[0, 1, 2, 3]] * 4, second, third]
    assert result.passes.tolist() == [len(third) + 1, 1, 3, 2]


@torch.inference_mode()
def test_a_bidirectional_block_is_run_whole_in_every_pass() -> None:
    bench = Bench(CONFIGS["dflash"])
    bench.denoise(Script({(1, "a"): [0], (2, "a"): [1]}), max_passes=3)
    assert [rows.places.tolist() for rows in bench.rows] == [[[0, 1, 2, 3]] * 4, [[0, 1, 2, 3]], [[0, 1, 2, 3]]]
    assert all(bool((rows.visible == 4).all()) for rows in bench.rows)


@torch.inference_mode()
def test_nothing_confident_ends_after_one_pass(config: DrafterConfig) -> None:
    bench = Bench(config)
    assert bench.denoise(NEVER, 5).passes.tolist() == [1] * 4
    assert len(bench.rows) == 1


@torch.inference_mode()
def test_everything_confident_leaves_the_last_token_of_the_shift_scheme(config: DrafterConfig) -> None:
    bench = Bench(config)
    result = bench.denoise(ALWAYS, 5)
    expected = 2 if config is CONFIGS["shift"] else 1
    assert result.passes.tolist() == [expected] * 4 and len(bench.rows) == expected
    if expected == 2:
        assert bench.fixed[1][:, :3].tolist() == result.trace[0][0].tokens[:, :3].tolist()
        assert bench.fixed[1][:, 3].tolist() == [-1] * 4


@pytest.mark.parametrize("max_passes", [1, 2, 3])
@torch.inference_mode()
def test_passes_are_limited(config: DrafterConfig, max_passes: int) -> None:
    bench = Bench(config)
    one_more_each_time = Script({(number, name): [number - 1] for number in (1, 2, 3) for name in LENGTHS})
    assert bench.denoise(one_more_each_time, max_passes).passes.tolist() == [max_passes] * 4


@torch.inference_mode()
def test_a_threshold_is_reached_by_a_probability_equal_to_it(config: DrafterConfig) -> None:
    probabilities = Bench(config).denoise(NEVER, 1).path.probabilities

    class Exactly:
        def at(self, pass_number: int, request_ids: Sequence[str], drafts: int) -> torch.Tensor:
            result = torch.full((len(request_ids), drafts), 2.0)
            result[:, 0] = probabilities[:, 0]
            return result

    bench = Bench(config)
    assert bench.denoise(Exactly(), 2).passes.tolist() == [2] * 4
    assert bool((bench.fixed[1][:, 0] >= 0).all()) and bool((bench.fixed[1][:, 1:] < 0).all())


@pytest.mark.parametrize("drafts", [1, 2])
@torch.inference_mode()
def test_fewer_draft_tokens_are_refined_too(config: DrafterConfig, drafts: int) -> None:
    bench = Bench(config)
    result = bench.denoise(Script({(1, name): [0] for name in LENGTHS}), 3, drafts)
    assert result.path.tokens.shape == (4, drafts)
    gains = 2 if drafts == 2 else 1
    assert result.passes.tolist() == [gains] * 4
    slots = drafts + config.block_size - config.num_draft_tokens if config.causal else config.block_size
    assert bench.rows[0].places.shape == (4, slots)
    if drafts == 2:
        observed_at = [0, 1, *[MASKED] * (slots - 2)]
        fixed = bench.fixed[1][2].tolist()
        dense = bench.dense_logits("c", fixed, observed_at)
        torch.testing.assert_close(bench.logits[1][2, 1], dense[1], rtol=1e-5, atol=1e-5)
