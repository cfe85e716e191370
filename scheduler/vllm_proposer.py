"""Hosts a ``drafter.types.Proposer`` where vLLM expects the class named by ``method="custom_class"``."""

from typing import Any

import torch
from vllm.config import VllmConfig

from drafter.types import Proposer, TargetModel, TargetShape
from scheduler.options import EngineOptions


def build_proposer(options: EngineOptions) -> Proposer:
    """The proposer that ``options`` ask for.

    Raises:
        ValueError: the options name none.
    """
    if options.recorder:
        from drafter.align.recorder import FeatureRecorder

        return FeatureRecorder(options.recorder.folder, options.recorder.layers)
    if options.drafter:
        from drafter.proposer import BlockDiffusionProposer

        return BlockDiffusionProposer.from_checkpoint(options.drafter.checkpoint, options.drafter.proposal)
    raise ValueError("speculation is on but the options name neither a drafter nor a recorder")


class ProposerHost:
    """Built by vLLM's runner; the runner subclass calls ``proposer`` itself, with what vLLM would not pass."""

    def __init__(self, vllm_config: VllmConfig):
        self.proposer = build_proposer(EngineOptions.from_additional_config(dict(vllm_config.additional_config)))
        self._model_config = vllm_config.model_config
        self._model: Any = None

    def load_model(self, model: torch.nn.Module) -> None:
        """Called by vLLM's runner once the target is loaded."""
        self._model = model

    def target(self) -> TargetModel:
        """The target's shared parts, read from the loaded vLLM model."""
        inner, hf_config = self._model.model, self._model_config.hf_text_config
        vocab = self._model_config.get_vocab_size()
        embedding = inner.embed_tokens.weight.data
        head = self._model.lm_head.weight.data if hasattr(self._model, "lm_head") else embedding
        return TargetModel(
            shape=TargetShape(
                hidden_size=self._model_config.get_hidden_size(),
                vocab_size=vocab,
                num_layers=hf_config.num_hidden_layers,
                path=self._model_config.model,
            ),
            embedding=embedding[:vocab],
            output_head=head[:vocab],
        )

    def propose(self, *args: object, **kwargs: object) -> list[list[int]]:
        """Unused: the runner subclass overrides the call that would reach this."""
        raise NotImplementedError("the proposer is driven by SlipstreamModelRunner")
