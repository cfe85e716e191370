"""Hidden states of targets whose class does not hand them out: taken where their decoder layers return them."""

from typing import Any

import torch
from torch import nn


def tap_hidden_states(model: nn.Module, layers: tuple[int, ...]) -> None:
    """Let ``model`` return ``(output, hidden states)``, as targets with vLLM's EAGLE-3 interface do.

    Hooks see nothing of a compiled or captured forward pass: the engine has to run eagerly.

    Args:
        model: a vLLM model for causal language modelling, whose decoder layers return a tensor, or the two parts of
            the residual stream.
        layers: from 1; ``i`` is what decoder layer ``i - 1`` returns.

    Raises:
        ValueError: it has no such layers.
    """
    decoder = _decoder(model)
    count = len(decoder)
    if bad := [layer for layer in layers if not 1 <= layer <= count]:
        raise ValueError(f"hidden states {bad} cannot be had of {type(model).__name__}: 1 to {count} can")
    taken: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _module, _inputs, output: taken.__setitem__(layer, _stream(output))

    for layer in layers:
        decoder[layer - 1].register_forward_hook(keep(layer))
    forward = model.forward

    def both(*args: Any, **kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
        output = forward(*args, **kwargs)
        return output, [taken.pop(layer) for layer in layers]

    model.forward = both


def _decoder(model: nn.Module) -> nn.ModuleList:
    whole: Any = model
    language_model = whole.get_language_model() if hasattr(whole, "get_language_model") else whole
    layers = getattr(getattr(language_model, "model", language_model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers whose hidden states could be read")
    return layers


def _stream(output: Any) -> torch.Tensor:
    """What a layer adds to the residual stream last, and the stream before that, together."""
    if isinstance(output, torch.Tensor):
        return output
    added, stream = output
    return added if stream is None else added + stream
