"""The viewer's port: viser's server behind a filter of requests.

viser 0.2.7, which nerfstudio 1.1.5 requires, serves every file of the machine that a path with ".." reaches, and accepts
connections from pages of any origin, which could then control the run.
"""

import http
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any, Optional
from urllib.parse import urlsplit

import viser
import websockets.server
from nerfstudio.utils.rich_utils import CONSOLE
from viser import infra
from viser._messages import ShareUrlUpdated
from websockets.datastructures import Headers

from wys_nerfstudio.training.interrupts import exit_on_error
from wys_nerfstudio.utils.errors import WysError

Response = tuple[http.HTTPStatus, dict[str, str], bytes]
RequestHandler = Callable[[str, Headers], Awaitable[Optional[Response]]]

SINGLE_HEADERS = ("Host", "Origin", "Upgrade", "Accept-Encoding")
"""Headers that decide about a request and must not be repeated."""


def restrict_viewer() -> None:
    """Filter the requests of every viser server that is created in this process from now on."""
    infra.WebsockServer = RestrictedServer  # type: ignore


def require_restricted(viewer: viser.ViserServer) -> None:
    """End the program with a sentence if the requests to a viewer are not filtered.

    Args:
        viewer: The viewer that has just started.
    """
    if not getattr(getattr(viewer, "_websock_server", None), "filtered", False):
        viewer.stop()
        with exit_on_error():
            raise WysError(
                "The requests to the viewer cannot be restricted with this version of viser: pip install viser==0.2.7, or train "
                "with --vis tensorboard."
            )


def is_own_page(origin: str, host: str, listens_on: str) -> bool:
    """Return whether a request comes from a page of the server that receives it.

    Args:
        origin: The request's Origin header.
        host: The request's Host header.
        listens_on: Name or address that the server listens on.
    """
    try:
        page = urlsplit(origin.lower())
    except ValueError:
        return False
    if not page.netloc or page.netloc != host.lower():
        return False
    # A foreign domain can resolve to this machine (DNS rebinding); Origin equals Host then, too.
    return _is_local_name(page.hostname) or not _is_loopback(listens_on)


def _is_local_name(name: Optional[str]) -> bool:
    """Return whether no foreign domain can have this name: an IP address or localhost."""
    return name is not None and (name == "localhost" or name.endswith(".localhost") or _address(name) is not None)


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return name == "localhost" if address is None else address.is_loopback


def _address(name: str) -> "ipaddress.IPv4Address | ipaddress.IPv6Address | None":
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


class RestrictedServer(infra.WebsockServer):
    """viser's server, which only serves the files of viser's client, to other programs and to its own pages."""

    filtered = False
    """Whether requests pass the filter; False if another version of viser starts its server in another way."""
    _share_url: Optional[str] = None
    _refused = False

    def start(self) -> None:
        """Start the server behind the filter; returns once it listens."""
        library: Any = websockets.server
        serve = library.serve

        def serve_filtered(*arguments: Any, process_request: Optional[RequestHandler] = None, **options: Any) -> Any:
            self.filtered = True
            return serve(*arguments, process_request=self._filter(process_request), **options)

        library.serve = serve_filtered
        try:
            super().start()
        finally:
            library.serve = serve

    def unsafe_send_message(self, message: Any) -> None:
        """Send a message to all clients, and note the share URL, whose pages have an origin of their own."""
        if isinstance(message, ShareUrlUpdated):
            self._share_url = message.share_url
        super().unsafe_send_message(message)

    def _filter(self, handle: Optional[RequestHandler]) -> RequestHandler:
        root = self._http_server_root
        files = {"/"}
        if root is not None:
            files |= {f"/{file.relative_to(root).as_posix()}" for file in root.rglob("*") if file.is_file()}

        async def filter_request(path: str, headers: Headers) -> Optional[Response]:
            if any(len(headers.get_all(name)) > 1 for name in SINGLE_HEADERS):
                return http.HTTPStatus.BAD_REQUEST, {}, b"400"
            if not self._is_allowed(headers.get("Origin"), headers.get("Host", "")):
                return http.HTTPStatus.FORBIDDEN, {}, b"403"
            if headers.get("Upgrade") != "websocket" and path.partition("?")[0] not in files:
                return http.HTTPStatus.NOT_FOUND, {}, b"404"
            return None if handle is None else await handle(path, headers)

        return filter_request

    def _is_allowed(self, origin: Optional[str], host: str) -> bool:
        # Browsers send the origin of a page with every connection; other programs send none.
        if origin is None or is_own_page(origin, host, self._host):
            return True
        if self._share_url is not None and urlsplit(self._share_url).netloc == origin.partition("://")[2]:
            return True
        if not self._refused:
            self._refused = True
            CONSOLE.print(
                f"wys: The viewer refused a connection from a page of another origin, {origin}.", markup=False
            )
        return False
