"""Every setting, declared once: name, default, range, unit and description.

``server.settings_catalogue`` reads these declarations to parse single values and to describe them;
``server.config`` layers presets, environment and flags over the defaults.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# A path of the user's: "~" is their home folder wherever the value comes from.
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


def _setting(default: Any, description: str, *, unit: str = "", **limits: Any) -> Any:
    """A field with its description, unit and pydantic limits (``ge``, ``gt``, ``le``, ``min_length``)."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelSettings(_Section):
    """The target model."""

    source: str = _setting(
        "smollm2-135m-instruct", "target: the name of a known model, or a folder with safetensors", min_length=1
    )
    served_name: str | None = _setting(
        None, "name of the model in the API; without one, the last part of the source", min_length=1
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = _setting(
        "float32", "number format of the target's weights and arithmetic"
    )
    weight_format: Literal["exact", "float32", "bfloat16", "int8", "vllm"] = _setting(
        "exact",
        "how a CPU holds float32 weights: exact keeps every number in the fewest bytes; bfloat16 and int8 round them, "
        "which changes the model; vllm leaves them to vLLM's kernels",
    )
    max_model_len: int = _setting(4096, "longest prompt and answer together", unit="tokens", ge=16, le=4_194_304)
    cache_dir: UserPath = _setting(Path("~/.cache/slipstream"), "folder for fetched and converted models")


class EngineSettings(_Section):
    """The engine that runs the target."""

    max_num_seqs: int = _setting(32, "requests that run at the same time", unit="requests", ge=1, le=4096)
    max_num_batched_tokens: int = _setting(
        2048, "tokens of one engine step; longer prompts are read in chunks", unit="tokens", ge=16, le=1_048_576
    )
    kv_cache_gib: float = _setting(1.0, "memory for K/V pages, the drafter's included", unit="GiB", gt=0, le=65_536)
    block_size: int = _setting(32, "tokens of one K/V page", unit="tokens", ge=1, le=1024)
    prefix_caching: bool = _setting(True, "keep the K/V pages of prompts for requests that begin alike")
    enforce_eager: bool = _setting(True, "run without compilation: ready sooner, steps possibly slower")
    seed: int = _setting(0, "seed of requests that bring none of their own", ge=0, le=2**32 - 1)
    instruction_set: Literal["auto", "avx512", "avx2", "scalar"] = _setting(
        "auto",
        "instructions that the CPU kernels use: the best of this processor, or these; answers may differ between",
    )


class SpeculationSettings(_Section):
    """The drafter, and how much of its drafts is verified."""

    enabled: bool = _setting(True, "draft tokens ahead; the answers are the same without")
    drafter: str = _setting(
        "smollm2-135m-instruct", "drafter: the name of a shipped checkpoint, or a folder", min_length=1
    )
    max_draft_tokens: int = _setting(5, "longest draft verified in one step", unit="tokens", ge=1, le=32)
    min_draft_tokens: int = _setting(
        0, "drafted tokens of a request that are verified whatever the load", unit="tokens", ge=0, le=32
    )
    policy: Literal["adaptive", "floor", "fixed"] = _setting(
        "adaptive",
        "how many drafted tokens are verified: what pays at the present load, by survival_floor alone, or all",
    )
    repetition: bool = _setting(True, "draft also what followed the latest tokens in the request's own text before")
    survival_floor: float = _setting(
        0.12,
        "with policy = floor, a drafted token less likely than this to be reached is not verified",
        unit="probability",
        ge=0,
        le=1,
    )
    trace_file: UserPath | None = _setting(
        None,
        "new file in which every draft and how it fared is recorded, for slipstream simulate; record with "
        "policy = fixed, so that everything is verified",
    )
    path: Literal["independent", "walk", "beam"] = _setting(
        "beam",
        "how a draft is picked: each token by itself, left to right with the drafter's Markov head, or the best of "
        "several paths under an n-gram model of the text so far",
    )
    beam_width: int = _setting(1, "paths that a beam keeps", unit="paths", ge=1, le=16)
    max_passes: int = _setting(
        1, "passes over a draft: from the second on, unsure tokens are drafted again given the sure ones", ge=1, le=8
    )
    observe_threshold: float = _setting(
        0.9, "a drafted token at least this likely is sure", unit="probability", ge=0, le=1
    )
    calibrated_threshold: bool = _setting(
        False, "take the thresholds of sure tokens from the first answer instead, and keep them"
    )
    stop_at_end: bool = _setting(True, "draft nothing behind a token that ends the answer")
    coupled_sampling: bool = _setting(
        True, "above temperature 0, draft with the random numbers that the answer is drawn with"
    )


class ServerSettings(_Section):
    """The HTTP server."""

    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 for every interface", min_length=1)
    port: int = _setting(8000, "TCP port to listen on", ge=1, le=65_535)
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "least severe messages that are logged")
    shutdown_grace_seconds: int = _setting(
        30, "time that running requests get to finish after SIGTERM", unit="seconds", ge=0, le=86_400
    )


class Settings(BaseModel):
    """All settings of a run, by section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    speculation: SpeculationSettings = SpeculationSettings()
    server: ServerSettings = ServerSettings()

    @model_validator(mode="after")
    def _batch_holds_one_token_of_each_request(self) -> "Settings":
        engine = self.engine
        if engine.max_num_batched_tokens < engine.max_num_seqs:
            raise ValueError(
                f"engine.max_num_batched_tokens = {engine.max_num_batched_tokens} is less than "
                f"engine.max_num_seqs = {engine.max_num_seqs}: a step needs room for one token of every request"
            )
        return self
