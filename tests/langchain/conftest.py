"""LangChain's tests run without sockets: nothing here needs a network."""

import pytest
from pytest_socket import disable_socket, enable_socket


@pytest.fixture(autouse=True)
def no_sockets():
    # asyncio wakes its loop by a pair of sockets of its own.
    disable_socket(allow_unix_socket=True)
    yield
    enable_socket()
