"""The viewer's port: requests of other programs and of pages, answered by viser's real server."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import viser
import websockets.server
from conftest import sentence_of
from hypothesis import given, settings
from hypothesis import strategies as st
from viser import infra
from viser._messages import ShareUrlUpdated
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from wys_nerfstudio.config import wys
from wys_nerfstudio.editing.stable_diffusion import PROFILE
from wys_nerfstudio.training.settings import RunSettings, Settings
from wys_nerfstudio.viewer.panel import ViewerPanel
from wys_nerfstudio.viewer.server import RestrictedServer, is_own_page

CLIENT = Path(viser.__file__).parent / "client" / "build"


def new_panel() -> ViewerPanel:
    return ViewerPanel(Settings(RunSettings.from_options(wys.config.pipeline, PROFILE.of_scenes), ["none"]), live=True)


def start(panel: ViewerPanel, host: str = "127.0.0.1") -> viser.ViserServer:
    """Start the viewer as nerfstudio does, after the pipeline has created its panel."""
    server = viser.ViserServer(host=host, port=7600, verbose=False)
    panel.install(server)
    return server


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Port of a viewer that listens on the local machine."""
    before = infra.WebsockServer
    server = start(new_panel())
    infra.WebsockServer = before  # type: ignore
    yield server.get_port()
    server.stop()


@pytest.fixture
def unrestricted(monkeypatch: pytest.MonkeyPatch) -> None:
    """viser as it is without this package."""
    monkeypatch.setattr(infra, "WebsockServer", RestrictedServer.__base__)


def request(port: int, path: str, *headers: str) -> tuple[int, bytes]:
    """Send a request as it is, which an HTTP library would normalize, and return status and body."""
    lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", *headers]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


OUTSIDE = [
    "/" + "../" * 20 + "etc/passwd",
    "/" + "../" * 20 + "etc/passwd?query",
    "/../../_viser.py",
    "/assets/../../../_viser.py",
    "/" + "../" * 20 + "proc/self/environ",
    "//etc/passwd",
    "/%2e%2e/%2e%2e/_viser.py",
    "/..%2f..%2f_viser.py",
    "/..\\..\\_viser.py",
    "/./../../_viser.py",
    "etc/passwd",
    "http://127.0.0.1/../../_viser.py",
    "/assets",
    "/..",
    "/" + "a" * 300,
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_files_outside_the_client_are_not_served(port: int, path: str, capfd) -> None:
    assert request(port, path) == (404, b"404")
    assert request(port, path, "Upgrade: WebSocket") == (404, b"404")
    assert "Traceback" not in capfd.readouterr().err


def test_a_link_beside_the_client_is_not_followed(port: int, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    link = os.path.relpath(tmp_path / "secret", CLIENT)
    assert request(port, f"/{link}")[0] == 404


def test_all_files_of_the_client_are_served(port: int) -> None:
    for file in CLIENT.rglob("*"):
        if file.is_file():
            assert request(port, f"/{file.relative_to(CLIENT).as_posix()}") == (200, file.read_bytes())
    index = (CLIENT / "index.html").read_bytes()
    assert request(port, "/") == request(port, "/?darkMode") == (200, index)


@pytest.mark.parametrize("header", ["Upgrade: websocket", "Origin: http://a", "Host: a", "Accept-Encoding: gzip"])
def test_repeated_headers_are_refused_without_traceback(port: int, header: str, capfd) -> None:
    assert request(port, "/", header, header)[0] == 400
    assert "Traceback" not in capfd.readouterr().err


def status(port: int, host: str, origin: "str | None", address: str = "127.0.0.1") -> int:
    """Return the status of a websocket handshake; 101 is success."""
    connection = socket.create_connection((address, port), timeout=10)
    try:
        # A connection that is accepted receives the viewer's controls.
        with connect(f"ws://{host}", sock=connection, origin=origin, proxy=None) as client:  # type: ignore
            assert client.recv(timeout=10)
            return 101
    except InvalidStatus as error:
        return error.response.status_code


def test_pages_of_other_origins_cannot_connect(port: int) -> None:
    own = f"127.0.0.1:{port}"
    for origin in (
        "http://evil.example",
        f"http://evil.example:{port}",
        "http://127.0.0.1:1",
        "http://127.0.0.1",
        f"http://127.0.0.1:{port}.evil.example",
        f"http://{own}@evil.example",
        "null",
        "file://",
        "http://[",
        "",
    ):
        assert status(port, own, origin) == 403, origin


def test_a_domain_that_resolves_to_this_machine_is_refused(port: int) -> None:
    assert status(port, f"evil.example:{port}", f"http://evil.example:{port}") == 403
    assert status(port, "127.0.0.1.evil.example", "http://127.0.0.1.evil.example") == 403


def test_own_pages_and_programs_can_connect(port: int) -> None:
    for host in (
        f"127.0.0.1:{port}",
        f"localhost:{port}",
        "localhost:8000",
        "[::1]:7007",
        "192.168.0.7:81",
        "LOCALHOST",
    ):
        assert status(port, host, f"http://{host}") == 101, host  # also through a forwarded port
        assert status(port, host, f"https://{host}") == 101, host  # also behind a TLS proxy
    assert status(port, f"127.0.0.1:{port}", None) == 101
    assert status(port, f"evil.example:{port}", None) == 101, "not a browser"


def test_a_viewer_opened_to_the_network_accepts_its_name(unrestricted: None) -> None:
    server = start(new_panel(), "0.0.0.0")
    port = server.get_port()
    assert status(port, f"workstation.lab:{port}", f"http://workstation.lab:{port}") == 101
    assert status(port, f"workstation.lab:{port}", "http://evil.example") == 403
    assert request(port, "/../../_viser.py")[0] == 404
    server.stop()


def test_a_share_url_is_accepted_while_it_is_shared(unrestricted: None) -> None:
    server = start(new_panel())
    port, shared = server.get_port(), "https://abc.share.viser.studio"
    assert status(port, f"127.0.0.1:{port}", shared) == 403
    server._websock_server.unsafe_send_message(ShareUrlUpdated(shared))
    assert status(port, f"127.0.0.1:{port}", shared) == 101
    assert status(port, f"127.0.0.1:{port}", "https://other.share.viser.studio") == 403
    server._websock_server.unsafe_send_message(ShareUrlUpdated(None))
    assert status(port, f"127.0.0.1:{port}", shared) == 403
    server.stop()


def test_the_first_refused_page_is_reported(unrestricted: None, capsys) -> None:
    server = start(new_panel())
    for origin in ("http://evil.example", "http://another.example"):
        status(server.get_port(), f"127.0.0.1:{server.get_port()}", origin)
    printed = " ".join(capsys.readouterr().out.split())
    assert "wys: The viewer refused a connection from a page of another origin, http://evil.example." in printed
    assert "another.example" not in printed
    server.stop()


@settings(max_examples=50)
@given(st.text(), st.text(), st.sampled_from(["127.0.0.1", "localhost", "::1", "0.0.0.0", "10.0.0.1", "host"]))
def test_no_header_breaks_the_check_of_origins(origin: str, host: str, listens_on: str) -> None:
    assert is_own_page(origin, host, listens_on) in (True, False)


class UnknownServer(RestrictedServer):
    """Server of a viser that does not start in the expected way."""

    def start(self) -> None:
        super(RestrictedServer, self).start()


@pytest.mark.parametrize("other", [UnknownServer, RestrictedServer.__base__])
def test_a_viser_that_bypasses_the_filter_is_refused(other: type, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = new_panel()
    monkeypatch.setattr(infra, "WebsockServer", other)
    sentence = sentence_of(lambda: start(panel))
    assert "cannot be restricted with this version of viser: pip install viser==0.2.7, or train with" in sentence


def test_other_websocket_servers_stay_as_they_are(port: int) -> None:
    assert websockets.server.serve is websockets.legacy.server.serve
