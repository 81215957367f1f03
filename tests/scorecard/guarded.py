"""A pytest plugin: every kernel launch between guard bands, and counted by kernel as the test's properties."""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    # Not above: nothing may import Triton before conftest.py does.
    from tests.support.buffers import guard_launches

    with guard_launches() as launches:
        result = yield
    item.user_properties += launches.items()
    return result
