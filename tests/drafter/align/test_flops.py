import torch

from drafter.align.flops import counted, measured_peak


def test_products_are_counted_forwards_and_backwards() -> None:
    left, right = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)

    def product() -> float:
        loss = (left @ right).sum()
        loss.backward()
        return float(loss.detach())

    value, operations = counted(product)
    assert value == 105.0
    assert operations == 2 * (2 * 3 * 5 * 7)  # the second time for the gradient of `left`


def test_the_peak_is_a_rate_that_a_processor_can_have() -> None:
    assert 1e9 < measured_peak(torch.float32) < 1e14
