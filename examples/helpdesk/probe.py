# SPDX-License-Identifier: Apache-2.0
"""Tries to reach a URL and says how far it got.

What it can try:

    http://HOST[:PORT]/…, https://…    a GET
    tcp://ADDRESS:PORT                 a connection; IPv6 as tcp://[fd00::1]:443
    udp-dns://SERVER[:PORT]/NAME       one DNS query for A, straight to that server
    doh://HOST[:PORT][/dns-query]?name=NAME    the same query, posted over HTTPS

Options, in the request's body or (sni, host, insecure, connect) in the URL's
query, which is then not sent:

    sni        the name in the TLS greeting, instead of the URL's
    host       the Host header, instead of the URL's
    connect    ADDRESS or NAME to connect to, instead of the URL's
    insecure   accept any certificate
    timeout_ms for the whole attempt, default 3000

The answer: {"ok", "kind", "status", "detail", "address", "ms", "url"}. `kind`
is the step at which it ended: "url" (not understood), "dns", "connect", "tls",
"closed" (accepted, then closed without a word), "timeout", "http", "tcp".
`ok` is true for an HTTP status below 400, a connection that stays open, and a
DNS answer with at least one address.
"""

import errno
import http.client
import socket
import ssl
import struct
import threading
import time
import urllib.parse

DEFAULT_TIMEOUT_MS = 3000
# A transparent proxy accepts first and closes when it has decided.
TCP_LINGER_S = 0.5
URL_OPTIONS = ("sni", "host", "connect", "insecure")


class Ended(Exception):
    """The attempt is over: at which step, with what status and detail."""

    def __init__(self, kind, detail, status=None, ok=False):
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.status = status
        self.ok = ok


class Attempt:
    """One URL with its options and its deadline."""

    def __init__(self, request):
        self.text = request.get("url")
        self.started = time.monotonic()
        timeout_ms = request.get("timeout_ms", DEFAULT_TIMEOUT_MS)
        if not isinstance(timeout_ms, (int, float)) or not 0 < timeout_ms <= 60_000:
            raise Ended("url", '"timeout_ms" must be a number above 0, at most 60000')
        self.deadline = self.started + timeout_ms / 1000
        if not isinstance(self.text, str):
            raise Ended("url", '"url" must be a text')
        try:
            self.url = urllib.parse.urlsplit(self.text)
            self.port = self.url.port
        except ValueError as error:
            raise Ended("url", str(error)) from error
        if not self.url.hostname:
            raise Ended("url", f"no host in {self.text!r}")
        pairs = urllib.parse.parse_qsl(self.url.query, keep_blank_values=True)
        options = {key: value for key, value in pairs if key in URL_OPTIONS}
        self.query = urllib.parse.urlencode([pair for pair in pairs if pair[0] not in URL_OPTIONS])
        options.update({key: request[key] for key in URL_OPTIONS if key in request})
        self.sni = options.get("sni") or self.url.hostname
        self.host = options.get("host") or self.url.netloc.rpartition("@")[2]
        self.connect_to = options.get("connect") or self.url.hostname
        self.insecure = str(options.get("insecure", "")).lower() in ("1", "true")
        self.address = None

    def left(self):
        """Seconds until the deadline, never less than a moment."""
        return max(self.deadline - time.monotonic(), 0.001)


def resolve(attempt, port, kind):
    """The addresses of a name, within the deadline (getaddrinfo has none)."""
    box = {}

    def look_up():
        try:
            box["found"] = socket.getaddrinfo(attempt.connect_to, port, type=kind)
        except OSError as error:
            box["error"] = error

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(attempt.left())
    if "error" in box:
        raise Ended("dns", f"{attempt.connect_to}: {box['error']}")
    if "found" not in box:
        raise Ended("timeout", f"looking up {attempt.connect_to}")
    return box["found"]


def connect(attempt, port):
    """A TCP connection to the first address that takes it."""
    last = None
    for family, kind, protocol, _, address in resolve(attempt, port, socket.SOCK_STREAM):
        attempt.address = address[0]
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(attempt.left())
        try:
            connection.connect(address)
            return connection
        except TimeoutError as error:
            last = Ended("timeout", f"connecting to {address[0]} port {port}")
            last.__cause__ = error
        except OSError as error:
            name = errno.errorcode.get(error.errno, str(error.errno))
            last = Ended("connect", f"{address[0]} port {port}: {name}")
            last.__cause__ = error
        connection.close()
    raise last


def start_tls(attempt, connection):
    """The TLS greeting with the name the caller wants."""
    context = ssl.create_default_context()
    if attempt.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    connection.settimeout(attempt.left())
    try:
        return context.wrap_socket(connection, server_hostname=attempt.sni)
    except TimeoutError as error:
        raise Ended("timeout", f"TLS with {attempt.sni}") from error
    except (ssl.SSLError, OSError, ValueError) as error:
        raise Ended("tls", f"{attempt.sni}: {type(error).__name__}: {error}") from error


def exchange(attempt, tls, method, target, body=None, headers=None):
    """One HTTP request and the start of its answer."""
    port = attempt.port or (443 if tls else 80)
    connection = connect(attempt, port)
    try:
        if tls:
            connection = start_tls(attempt, connection)
        connection.settimeout(attempt.left())
        client = http.client.HTTPConnection(attempt.host)
        client.sock = connection
        try:
            client.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            client.putheader("Host", attempt.host)
            client.putheader("Connection", "close")
            for name, value in (headers or {}).items():
                client.putheader(name, value)
            if body is not None:
                client.putheader("Content-Length", str(len(body)))
            client.endheaders(body)
            response = client.getresponse()
            return response.status, response.read(65536)
        except TimeoutError as error:
            raise Ended("timeout", "waiting for the HTTP answer") from error
        except (http.client.RemoteDisconnected, ConnectionError, ssl.SSLError) as error:
            raise Ended("closed", f"{type(error).__name__}: {error}") from error
        except (http.client.HTTPException, OSError) as error:
            raise Ended("http", f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()


def try_http(attempt):
    """A GET over HTTP or HTTPS."""
    target = (attempt.url.path or "/") + (f"?{attempt.query}" if attempt.query else "")
    status, body = exchange(attempt, attempt.url.scheme == "https", "GET", target)
    text = body[:200].decode("utf-8", "replace").strip()
    raise Ended("http", text, status=status, ok=status < 400)


def try_tcp(attempt):
    """A connection that is held for a moment, to see whether it stays."""
    if attempt.port is None:
        raise Ended("url", "tcp:// needs a port")
    with connect(attempt, attempt.port) as connection:
        connection.settimeout(min(TCP_LINGER_S, attempt.left()))
        try:
            data = connection.recv(64)
        except TimeoutError:
            raise Ended("tcp", "connected", ok=True) from None
        except OSError as error:
            raise Ended("closed", f"after connecting: {error}") from error
        if not data:
            raise Ended("closed", "accepted, then closed without a word")
        raise Ended("tcp", f"connected, got {len(data)} bytes", ok=True)


def dns_query(name):
    """A recursive query for A records of a name (RFC 1035, section 4.1)."""
    labels = b""
    for label in name.rstrip(".").split("."):
        data = label.encode("idna") if label else b""
        if not 0 < len(data) < 64:
            raise Ended("url", f"{name!r} is not a DNS name")
        labels += bytes([len(data)]) + data
    return struct.pack(">HHHHHH", 0x5353, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)


def dns_verdict(data):
    """Ends the attempt with what a DNS answer says."""
    if len(data) < 12:
        raise Ended("dns", f"the answer has only {len(data)} bytes")
    flags, _, answers = struct.unpack(">HHH", data[2:8])
    code = flags & 0xF
    names = {0: "NOERROR", 2: "SERVFAIL", 3: "NXDOMAIN", 5: "REFUSED"}
    detail = f"{names.get(code, code)}, {answers} answers"
    raise Ended("dns", detail, status=code, ok=code == 0 and answers > 0)


def try_udp_dns(attempt):
    """A query over UDP to the server that the URL names, past any resolver."""
    query = dns_query(attempt.url.path.strip("/") or "example.com")
    port = attempt.port or 53
    family, kind, protocol, _, address = resolve(attempt, port, socket.SOCK_DGRAM)[0]
    attempt.address = address[0]
    with socket.socket(family, kind, protocol) as connection:
        connection.settimeout(attempt.left())
        try:
            connection.connect(address)
            connection.send(query)
            data = connection.recv(4096)
        except TimeoutError as error:
            raise Ended("timeout", f"no answer from {address[0]} port {port}") from error
        except OSError as error:
            name = errno.errorcode.get(error.errno, str(error.errno))
            raise Ended("connect", f"{address[0]} port {port}: {name}") from error
    dns_verdict(data)


def try_doh(attempt):
    """The same query as an RFC 8484 POST."""
    name = dict(urllib.parse.parse_qsl(attempt.query)).get("name", "example.com")
    kind = "application/dns-message"
    target = attempt.url.path if attempt.url.path not in ("", "/") else "/dns-query"
    status, data = exchange(
        attempt, True, "POST", target, dns_query(name), {"Content-Type": kind, "Accept": kind}
    )
    if status != 200:
        raise Ended("http", data[:200].decode("utf-8", "replace").strip(), status=status)
    dns_verdict(data)


SCHEMES = {
    "http": try_http,
    "https": try_http,
    "tcp": try_tcp,
    "udp-dns": try_udp_dns,
    "doh": try_doh,
}


def probe(request):
    """Tries what a request asks for; never raises for what the network does."""
    started = time.monotonic()
    attempt = None
    try:
        attempt = Attempt(request)
        scheme = SCHEMES.get(attempt.url.scheme)
        if scheme is None:
            raise Ended("url", f"unknown scheme {attempt.url.scheme!r}; known: {', '.join(SCHEMES)}")
        scheme(attempt)
        raise Ended("url", "nothing was tried")
    except Ended as end:
        return {
            "ok": end.ok,
            "kind": end.kind,
            "status": end.status,
            "detail": end.detail,
            "address": attempt.address if attempt else None,
            "ms": round((time.monotonic() - started) * 1000, 1),
            "url": request.get("url"),
        }
