"""Two processes train as one: on the CPU, with gloo."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from drafter.align.ranks import Ranks
from tests.drafter.align.two_ranks import run_on_two_ranks

_TWO = """
import json
from pathlib import Path
import torch
from torch import nn
from drafter.align.ranks import Ranks

ranks = Ranks.join()
assert ranks == Ranks.join() and ranks.size == 2
model = nn.Linear(3, 2)
nn.init.constant_(model.weight, 1.0), nn.init.constant_(model.bias, 0.0)
rows = torch.arange(12.0).view(4, 3)
mine = rows[torch.tensor(ranks.share(range(4)))]
model(mine).square().mean().backward()
if ranks.rank == 1:
    model.bias.grad = None
ranks.average_gradients(list(model.parameters()))
said = [ranks.is_first, ranks.average(float(ranks.rank)), model.weight.grad.tolist()]
Path(f"{ranks.rank}.json").write_text(json.dumps(said))  # what both print can get mixed
ranks.leave()
"""


def test_one_process_is_alone() -> None:
    ranks = Ranks.join({})
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.average(0.5) == 0.5
    model = nn.Linear(2, 1)
    ranks.average_gradients(model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    ranks.leave()


@pytest.mark.parametrize("size", [2, 3])
def test_shares_are_disjoint_and_complete(size: int) -> None:
    items = list(range(7))
    shares = [Ranks(rank, size).share(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == items
    assert min(map(len, shares)) >= 2


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    run_on_two_ranks(_TWO, tmp_path)
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 0.0)
    model(torch.arange(12.0).view(4, 3)).square().mean().backward()
    assert model.weight.grad is not None
    said = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert said == [[rank == 0, 0.5, model.weight.grad.tolist()] for rank in (0, 1)]
