"""The tests of LangChain run without sockets, because none of them needs a network."""

import pytest
from pytest_socket import disable_socket, enable_socket


@pytest.fixture(autouse=True)
def no_sockets():
    # asyncio wakes its event loop through a pair of Unix sockets.
    disable_socket(allow_unix_socket=True)
    yield
    enable_socket()
