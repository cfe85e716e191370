"""vLLM's worker with the Slipstream runner inside, and the proposer's pages in its memory budget."""

from collections.abc import Mapping
from typing import Any, cast
from unittest import mock

from vllm.platforms import current_platform

from cuda_ext import ops
from scheduler.options import EngineOptions, TargetWeights
from scheduler.vllm_linear import packed_linears
from scheduler.vllm_platform import BaseWorker, runner_module, runner_name
from scheduler.vllm_runner import SlipstreamModelRunner


class SlipstreamWorker(BaseWorker):
    """Named in ``worker_cls``; lives in the worker process."""

    model_runner: SlipstreamModelRunner

    def init_device(self) -> None:
        """Let vLLM set the device up with our runner in the place of its own, which it names directly."""
        with mock.patch.object(runner_module, runner_name, SlipstreamModelRunner):
            super().init_device()

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the target, on a CPU with its layers on our kernels."""
        options = EngineOptions.from_additional_config(dict(self.vllm_config.additional_config))
        ops.use_instruction_set(options.instruction_set)
        with packed_linears(options.weights):
            super().load_model(load_dummy_weights=load_dummy_weights)
        if current_platform.is_cpu() and options.weights is not TargetWeights.VLLM:
            from scheduler.vllm_decoder import fuse_decoder_layers

            fuse_decoder_layers(self.model_runner.model, self.vllm_config)

    def determine_available_memory(self) -> int:
        """Bytes for the target's pages: what there is, less the share that the proposer's pages will take."""
        available = cast(int, super().determine_available_memory())
        extra = self.proposer_cache_bytes_per_token()
        if not extra:
            return available
        specs = self.model_runner.get_kv_cache_spec().values()
        target = sum(spec.page_size_bytes / spec.block_size for spec in specs)
        return int(available * target / (target + extra))

    def proposer_cache_bytes_per_token(self) -> int:
        """Bytes of paged cache that the proposer needs for one token of context."""
        host = getattr(self.model_runner, "drafter", None)
        return host.proposer.cache_bytes_per_token() if host else 0

    def proposer_command(self, name: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Reached from the front end by ``AsyncLLM.collective_rpc``; see ``Proposer.command``."""
        host = getattr(self.model_runner, "drafter", None)
        return host.proposer.command(name, arguments) if host else {}
