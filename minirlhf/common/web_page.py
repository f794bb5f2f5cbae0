"""Pages in the browser, served by gradio (extra `web`) on this machine and without the internet."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from minirlhf.common.printing import show

HOST, PORT = "127.0.0.1", 7860
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "sans-serif"]


def require_web(host: str = HOST, port: int = PORT) -> Any:
    """The module gradio, if it can serve a page at this address.

    Raises ImportError that names the extra if it is not installed, ValueError for a port outside 1 to 65535, OSError
    if the port is in use or the address is not of this machine.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be 1 to 65535, got {port}")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise OSError(f"no page can be served at {host}:{port}: {why}; choose another --host or --port") from None
    try:
        import gradio
    except ImportError as error:
        raise ImportError("a page in the browser needs gradio: pip install gradio (minirlhf's extra web)") from error
    return gradio


@contextlib.contextmanager
def served(page: Any, host: str = HOST, port: int = PORT, css: str = "") -> Iterator[str]:
    """Serve a `gradio.Blocks` inside this context, and print its address, which is also what the context gives.

    host: "0.0.0.0" lets other machines in, too. Raises as `require_web`.
    """
    gradio = require_web(host, port)
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), HOST, "localhost", host]))
    theme = gradio.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host, server_port=port, share=False, inbrowser=False, ssr_mode=False, mcp_server=False, pwa=False,
        quiet=True, prevent_thread_lock=True, show_error=True, footer_links=[], theme=theme, css=css,
    )  # fmt: skip
    url = f"http://{socket.gethostname() if host == '0.0.0.0' else host}:{port}"
    show(f"open {url} in a browser; Ctrl-C ends")
    try:
        yield url
    finally:
        page.close(verbose=False)
