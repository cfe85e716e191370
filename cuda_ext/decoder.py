"""The weights of a decoder layer as the operators that run a whole layer in one call take them."""

from dataclasses import dataclass
from functools import cached_property

import torch

from cuda_ext.linear import PANEL, PackedWeight


@dataclass(frozen=True)
class DecoderLayerWeights:
    """A pre-norm decoder layer with grouped-query attention and a gated SiLU network, as Llama and Qwen have it.

    Attributes:
        input_norm, post_norm: ``[hidden]`` weights of the RMS norms before attention and before the network.
        eps: of all norms.
        qkv: queries, keys and values, one below the other, ``[(heads + 2 * kv_heads) * head_dim, hidden]``.
        output: ``[hidden, heads * head_dim]``.
        gate_up: gate and up projection, one below the other, ``[2 * intermediate, hidden]``.
        down: ``[hidden, intermediate]``.
        heads: of queries.
        qkv_bias: ``[(heads + 2 * kv_heads) * head_dim]`` or ``None``.
        query_norm, key_norm: ``[head_dim]`` weights of RMS norms over each head, or ``None``.

    Raises:
        ValueError: ``intermediate`` is no whole number of panels.
    """

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    eps: float
    qkv: PackedWeight
    output: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    heads: int
    qkv_bias: torch.Tensor | None = None
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.down.in_features % PANEL:
            raise ValueError(f"intermediate is {self.down.in_features}, expected a multiple of {PANEL}")

    @cached_property
    def arguments(self) -> tuple[object, ...]:
        """The last arguments of the operators, from ``input_norm`` on."""
        packed = (self.qkv, self.output, self.gate_up, self.down)
        nothing = torch.empty(0)
        return (
            self.input_norm,
            self.post_norm,
            self.eps,
            [weight.panels for weight in packed],
            [nothing if weight.scales is None else weight.scales for weight in packed],
            [weight.format.value for weight in packed],
            self.heads,
            self.down.in_features,
            self.qkv_bias,
            self.query_norm,
            self.key_norm,
        )
