"""What keeps a page from being served, in one line each, before any work; without gradio."""

import socket
import sys
import types

import pytest

from minirlhf.common.web_page import HOST, require_web


@pytest.fixture
def gradio(monkeypatch):
    """A stand-in for the package, which takes seconds to import."""
    monkeypatch.setitem(sys.modules, "gradio", stand_in := types.ModuleType("gradio"))
    return stand_in


@pytest.fixture
def free_port():
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


def test_a_free_port_gives_gradio(gradio, free_port):
    assert require_web(HOST, free_port) is gradio
    assert require_web(HOST, free_port) is gradio  # the look at it leaves it free


def test_a_port_in_use_is_named(gradio):
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=rf"^no page can be served at {HOST}:{port}: Address already in use; choose"):
            require_web(HOST, port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none_is_refused(gradio, port):
    with pytest.raises(ValueError, match=rf"^--port must be 1 to 65535, got {port}$"):
        require_web(HOST, port)


def test_an_address_of_another_machine_is_refused(gradio, free_port):
    with pytest.raises(OSError, match=r"^no page can be served at 192\.0\.2\.1:.*choose another --host or --port$"):
        require_web("192.0.2.1", free_port)  # of documentation (RFC 5737): no machine has it


def test_without_gradio_the_extra_is_named(monkeypatch, free_port):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"needs gradio: pip install gradio \(minirlhf's extra web\)$"):
        require_web(HOST, free_port)
