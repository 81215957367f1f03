"""A model may write in place over a layer's output, from which the magnitude's gradient is read."""

import pytest
import torch

from dora_kernels.ops.output import OutputUse, WriteCounter
from tests.support.leaves import TRAINABLE, forward, leaves_of
from tests.support.oracle import make_problem, relative_error
from tests.tolerances import TWIN

SPACES = pytest.mark.parametrize("space", ["token", "weight"])


def problem(bias):
    return make_problem(40, 48, 56, 3, dtype=torch.float32, adapter_dtype=torch.float32, bias=bias)


IN_PLACE = {
    "add_": lambda y: y.add_(1.0),
    "mul_": lambda y: y.mul_(2.0),
    "relu_": torch.relu_,
    "zero_": lambda y: y.zero_(),
    "residual": lambda y: y.__iadd__(torch.ones_like(y)),
    "dropout_": lambda y: torch.nn.functional.dropout(y, 0.5, inplace=True),
    "masked_fill_": lambda y: y.masked_fill_(torch.ones_like(y) > 0, 0.0),
    "slice": lambda y: y[:, :3].fill_(0.0),
}
OUT_OF_PLACE = {
    "add_": lambda y: y + 1.0,
    "mul_": lambda y: y * 2.0,
    "relu_": torch.relu,
    "zero_": lambda y: y * 0.0,
    "residual": lambda y: y + torch.ones_like(y),
    "dropout_": lambda y: torch.nn.functional.dropout(y, 0.5),
    "masked_fill_": lambda y: y.masked_fill(torch.ones_like(y) > 0, 0.0),
    "slice": lambda y: torch.cat([y[:, :3] * 0.0, y[:, 3:]], dim=1),
}


@SPACES
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_the_model_may_write_over_the_output(name, bias, space):
    p = problem(bias)
    tensors = leaves_of(p)
    leaves = list(tensors.values())
    y = forward(p, tensors, space=space, impl="triton")
    torch.manual_seed(1)
    expected = torch.autograd.grad(OUT_OF_PLACE[name](y), leaves, p.grad_y)
    y = forward(p, tensors, space=space, impl="triton")
    torch.manual_seed(1)
    changed = IN_PLACE[name](y)
    grads = torch.autograd.grad(y if name == "slice" else changed, leaves, p.grad_y)
    for leaf, grad, right in zip(tensors, grads, expected):
        # The product that dm is read from is computed again, without the division by g.
        assert relative_error(grad, right) <= (TWIN[grad.dtype] if leaf == "magnitude" else 0.0), leaf


@SPACES
@pytest.mark.parametrize(
    ("trained", "options"),
    [(TRAINABLE, {"lora_dropout": 0.5}), (("x", "lora_B", "magnitude"), {})],
    ids=["dropout", "frozen_A"],
)
def test_an_output_that_cannot_be_computed_again_raises_and_is_a_copy_from_then_on(trained, options, space):
    if options and space == "weight":
        options, trained = {}, ("magnitude",)
    p, use = problem(bias=False), OutputUse()
    tensors = leaves_of(p, trained)
    leaves = [tensors[name] for name in trained if name in tensors]

    def gradients(write):
        torch.manual_seed(1)
        y = forward(p, tensors, space=space, impl="triton", training=True, output_use=use, **options)
        return torch.autograd.grad(write(y), leaves, p.grad_y)

    expected = gradients(OUT_OF_PLACE["relu_"])
    assert not use.is_written
    with pytest.raises(RuntimeError, match=r"wrote in place over a DoRA layer's output.*run the step again"):
        gradients(IN_PLACE["relu_"])
    assert use.is_written
    assert all(map(torch.equal, gradients(IN_PLACE["relu_"]), expected))


def test_a_counter_of_writes_holds_no_memory():
    y = torch.zeros(3, 4)
    counter = WriteCounter(y)
    assert not counter.has_moved
    assert y.storage_offset() == 0 and counter._alias.untyped_storage().nbytes() == 0
    y.view(12)[:5].add_(1.0)
    assert counter.has_moved and y.sum() == 5
