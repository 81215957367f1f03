"""Every layout of the input with every layout of the incoming gradient, by the suite's own check."""

from functools import cache
from itertools import product

from .row import Row, none_fail


@cache
def _cases():
    from tests.ops.test_layouts import FORMS, LAYOUTS

    return {
        f"{x_layout} {grad_layout} {str(dtype).removeprefix('torch.')}": (x_layout, grad_layout, dtype)
        for x_layout, grad_layout, dtype in product(LAYOUTS, LAYOUTS, sorted({dtype for _, dtype in FORMS}, key=str))
    }


def run(case):
    from tests.ops.test_layouts import FORMS, test_input_and_incoming_gradient

    x_layout, grad_layout, dtype = _cases()[case]
    spaces = [space for space, of in FORMS if of == dtype]
    for space in spaces:
        test_input_and_incoming_gradient(x_layout, grad_layout, space, dtype)
    return {"spaces": spaces}


ROW = Row(
    what="layouts: 7 of the input × 7 of the incoming gradient × 3 dtypes, each in every form that takes it",
    target="147, 0 failures",
    cases=_cases,
    run=run,
    judge=none_fail(147),
    fast=True,
)
