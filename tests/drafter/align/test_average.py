import torch
from torch import nn

from drafter.align.average import WeightAverage


def filled(value: float) -> nn.Linear:
    model = nn.Linear(2, 3)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def test_the_mean_of_what_passed_by() -> None:
    average, model = WeightAverage(), filled(0)
    for value in (1.0, 2.0, 6.0):
        average.add(filled(value))
    average.put_into(model)
    assert all(bool((parameter == 3).all()) for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_nothing_that_passed_by_changes_nothing() -> None:
    model = filled(5)
    WeightAverage().put_into(model)
    assert all(bool((parameter == 5).all()) for parameter in model.parameters())


def test_a_saved_average_goes_on() -> None:
    whole, first, second = WeightAverage(), WeightAverage(), WeightAverage()
    for value in (0.1, 0.7):
        whole.add(filled(value))
        first.add(filled(value))
    second.restore(first.state())
    models = []
    for average in (whole, second):
        average.add(filled(0.4))
        models.append(filled(0))
        average.put_into(models[-1])
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
