import pytest
import torch
from torch import nn

from scheduler.vllm_hidden_states import tap_hidden_states


class Layer(nn.Module):
    """Adds ``number`` to the stream; ``parts`` says how it returns it."""

    def __init__(self, number: int, parts: str):
        super().__init__()
        self.number, self.parts = number, parts

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> object:
        stream = hidden if residual is None else hidden + residual
        added = torch.full_like(stream, float(self.number))
        return {"whole": stream + added, "first": (stream + added, None), "parts": (added, stream)}[self.parts]


class Decoder(nn.Module):
    def __init__(self, parts: str):
        super().__init__()
        self.layers = nn.ModuleList(Layer(10**i, parts) for i in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = None
        for layer in self.layers:
            output = layer(hidden, residual)
            hidden, residual = output if isinstance(output, tuple) else (output, None)
        return hidden if residual is None else hidden + residual


class Target(nn.Module):
    def __init__(self, parts: str = "parts"):
        super().__init__()
        self.model = Decoder(parts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(hidden)
        return -output


class Multimodal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = Target()

    def get_language_model(self) -> nn.Module:
        return self.language_model

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.language_model(hidden)
        return output


@pytest.mark.parametrize("target", [Target("parts"), Target("first"), Target("whole"), Multimodal()])
def test_a_tapped_target_returns_its_residual_stream_too(target: nn.Module) -> None:
    tap_hidden_states(target, (4, 1, 3))
    for value in (0.5, 0.25):
        output, hidden = target(torch.full((2, 3), value))
        assert torch.equal(output, torch.full((2, 3), -(1111 + value)))
        assert [float(states[0, 0]) for states in hidden] == [1111 + value, 1 + value, 111 + value]


@pytest.mark.parametrize("layers", [(0, 1), (5,)])
def test_layers_that_do_not_exist_are_named(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hidden states \[.\] cannot be had of Target: 1 to 4 can"):
        tap_hidden_states(Target(), layers)


def test_a_target_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no list of decoder layers"):
        tap_hidden_states(nn.Linear(1, 1), (1,))
