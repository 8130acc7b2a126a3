"""Roll call before jax starts, and a watch over the processes afterwards. Plain sockets, no jax.

jax's own start-up aborts the interpreter when a process is missing and does not say which one. So
process 0 first waits here for everybody, compares what they are about to run, and answers each
with "welcome" or with one sentence. The same connections then carry heartbeats: a process that dies
closes its connection and the others stop at once; a host that vanishes is noticed after
`timeout_s`. Messages are JSON lines; the port is as private as jax's coordinator port beside it.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from sdjax.distributed.cluster import Cluster, StartupError, this_host

EXIT_PEER_LOST = 75  # EX_TEMPFAIL: the same command may be run again
PORT_OFFSET = 7000
HELLO_TIMEOUT_S = 10.0
MAX_LINE_BYTES = 1 << 22
MAX_DIFFERENCES = 4

Fingerprint = Mapping[str, str]


class Peer:
    """One connection: who is at the other end, when it last spoke, whether it said goodbye."""

    def __init__(self, process: int, host: str, sock: socket.socket):
        self.process, self.host, self.sock = process, host, sock
        self.last_heard = time.monotonic()
        self.left = False
        self._buffer = b""
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends one message; a broken connection is left for the reader to notice."""
        try:
            with self._lock:
                self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict] | None:
        """The complete messages that have arrived, or None at the end of the connection."""
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data or len(self._buffer) > MAX_LINE_BYTES:
            return None
        self.last_heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines if line]

    def receive_one(self, deadline: float) -> dict | None:
        """Waits for the first message until `deadline`; None when the peer hung up or was late."""
        while (left := deadline - time.monotonic()) > 0:
            self.sock.settimeout(left)
            messages = self.receive()
            if messages is None:
                return None
            if messages:
                return messages[0]
        return None


def roll_call_port(coordinator: str) -> int:
    """The roll call's port: 7000 below the coordinator's, or above when that is reserved."""
    port = int(coordinator.rsplit(":", 1)[1])
    return port - PORT_OFFSET if port - PORT_OFFSET > 1024 else port + PORT_OFFSET


def roll_call(cluster: Cluster, fingerprint: Fingerprint, timeout_s: float) -> list[Peer]:
    """Waits until every process has reported; returns the open connections (all, or process 0's).

    Raises StartupError in every process that is there when others are missing after `timeout_s`, or
    when one of them is about to run something else.
    """
    deadline = time.monotonic() + timeout_s
    if cluster.process_index == 0:
        return _call_roll(cluster, fingerprint, deadline, timeout_s)
    return [_report(cluster, fingerprint, deadline, timeout_s)]


def _call_roll(
    cluster: Cluster, fingerprint: Fingerprint, deadline: float, timeout_s: float
) -> list[Peer]:
    """Process 0: collects the others' reports, judges, and tells everybody."""
    peers: dict[int, Peer] = {}
    problems: list[str] = []
    with _listen(cluster) as server:
        while len(peers) < cluster.process_count - 1 and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock, _ = server.accept()
            except TimeoutError:
                break
            peer, hello = _welcome(sock)
            if peer is None:
                continue
            problem = _check_report(cluster, peer, hello, peers)
            if problem:
                peer.send({"type": "refused", "message": problem})
                problems.append(problem)
                break
            peers[peer.process] = peer
            who = f"process {peer.process} ({peer.host})"
            problems += compare(fingerprint, hello["fingerprint"], who)
            if problems:  # a moment for the others, so that every odd one is named
                deadline = min(deadline, time.monotonic() + HELLO_TIMEOUT_S)
    if not problems and len(peers) < cluster.process_count - 1:
        problems.append(_missing(cluster, peers, timeout_s))
    if problems:
        message = "; ".join(problems[:MAX_DIFFERENCES])
        for peer in peers.values():
            peer.send({"type": "refused", "message": message})
            peer.sock.close()
        raise StartupError(message)
    for peer in peers.values():
        peer.send({"type": "welcome"})
    return list(peers.values())


def _listen(cluster: Cluster) -> socket.socket:
    """Process 0's socket; only on the loopback device when the coordinator is this machine."""
    host = cluster.coordinator.rsplit(":", 1)[0]
    port = roll_call_port(cluster.coordinator)
    bind = "127.0.0.1" if host in ("localhost", "127.0.0.1") else ""
    try:
        return socket.create_server((bind, port), backlog=cluster.process_count)
    except OSError as error:
        raise StartupError(
            f"process 0 cannot listen on port {port} ({error.strerror}): another run may still be "
            "alive on this host; stop it, or choose another port in config.distributed.coordinator"
        ) from error


def _welcome(sock: socket.socket) -> tuple[Peer | None, dict]:
    """Reads a newcomer's report; (None, {}) for a stranger who does not speak our language."""
    peer = Peer(-1, "", sock)
    try:
        hello = peer.receive_one(time.monotonic() + HELLO_TIMEOUT_S)
        peer.process, peer.host = int(hello["process"]), str(hello["host"])
        if not isinstance(hello["fingerprint"], dict):
            raise ValueError("fingerprint")
    except (ValueError, KeyError, TypeError):
        sock.close()
        return None, {}
    return peer, hello


def _check_report(
    cluster: Cluster, peer: Peer, hello: Mapping[str, Any], peers: Mapping[int, Peer]
) -> str:
    """What is wrong with a report's own account of the cluster; empty when nothing is."""
    if hello.get("count") != cluster.process_count:
        return (
            f"process {peer.process} ({peer.host}) expects {hello.get('count')} processes, process "
            f"0 expects {cluster.process_count}: start all with the same number of processes"
        )
    if peer.process in peers or not 0 < peer.process < cluster.process_count:
        first = peers[peer.process].host if peer.process in peers else this_host()
        return (
            f"two processes call themselves {peer.process} ({first} and {peer.host}): give each "
            "its own JAX_PROCESS_ID, or stop the older run"
        )
    return ""


def _missing(cluster: Cluster, peers: Mapping[int, Peer], timeout_s: float) -> str:
    """The sentence that names who did not come."""
    absent = [i for i in range(1, cluster.process_count) if i not in peers]
    names = ", ".join(cluster.name(i) for i in absent[:16]) + (" ..." if len(absent) > 16 else "")
    return (
        f"{len(absent)} of {cluster.process_count} processes did not start within "
        f"{timeout_s:g} s: missing {names}; run the same command on all hosts (launch/tpu_vm.sh "
        "run does), or set config.distributed.method=single to use this host alone"
    )


def _report(cluster: Cluster, fingerprint: Fingerprint, deadline: float, timeout_s: float) -> Peer:
    """Every other process: reports to process 0 and waits for its word."""
    host = cluster.coordinator.rsplit(":", 1)[0]
    port = roll_call_port(cluster.coordinator)
    gone = (
        f"process 0 at {host}:{port} did not answer process {cluster.process_index} within "
        f"{timeout_s:g} s: start the same command on all hosts, and let the hosts reach each other "
        "on this port"
    )
    sock = _connect(host, port, deadline)
    if sock is None:
        raise StartupError(gone)
    peer = Peer(0, host, sock)
    peer.send(
        {
            "process": cluster.process_index,
            "count": cluster.process_count,
            "host": this_host(),
            "fingerprint": dict(fingerprint),
        }
    )
    # Process 0 decides at its own deadline, which may lie a little after ours.
    answer = peer.receive_one(deadline + HELLO_TIMEOUT_S + timeout_s)
    if answer is None:
        raise StartupError(gone)
    if answer["type"] != "welcome":
        raise StartupError(answer["message"])
    return peer


def _connect(host: str, port: int, deadline: float) -> socket.socket | None:
    """A connection to process 0, tried again until the deadline."""
    while time.monotonic() < deadline:
        try:
            return socket.create_connection((host, port), timeout=HELLO_TIMEOUT_S)
        except OSError:
            time.sleep(0.2)  # process 0 is not up yet
    return None


def compare(mine: Fingerprint, theirs: Fingerprint, who: str) -> list[str]:
    """One sentence for each entry in which another process differs from process 0."""
    names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
    return [
        f"{who} has {name}={theirs.get(name, 'nothing')} but process 0 has "
        f"{mine.get(name, 'nothing')}: start all processes with the same code, versions and config"
        for name in names[:MAX_DIFFERENCES]
    ]


class Watch:
    """Listens to the other processes of a run until `close`; calls `on_loss(sentence, code)` once.

    Process 0 hears everybody and passes news on; the others hear process 0. `stop_asked` is set in
    every process once any of them has called `ask_stop`. `code` is the exit code that the failure
    asks of all processes: EXIT_PEER_LOST unless the input itself was wrong.
    """

    def __init__(self, process: int, peers: list[Peer], timeout_s: float, on_loss: Callable):
        self.stop_asked = threading.Event()
        self.loss, self.code = "", EXIT_PEER_LOST
        self._process, self._peers, self._timeout_s = process, peers, timeout_s
        self._on_loss, self._closed = on_loss, threading.Event()
        for peer in peers:
            peer.last_heard = time.monotonic()
            peer.sock.settimeout(5.0)
        self._thread = threading.Thread(target=self._run, name="sdjax-watch", daemon=True)
        self._thread.start()

    def ask_stop(self) -> None:
        """Asks every process to stop at the next safe point."""
        self.stop_asked.set()
        self._tell({"type": "stop"})

    def report_failure(self, message: str, code: int) -> None:
        """Tells the others that this process failed, and why, before it leaves."""
        self._closed.set()
        about = {"process": self._process, "message": message, "code": code}
        self._tell({"type": "failed", **about})

    def close(self) -> None:
        """Says goodbye, so that the end of this process is not taken for a death."""
        self._closed.set()
        self._tell({"type": "bye"})
        self._thread.join(timeout=self._timeout_s)
        for peer in self._peers:
            peer.sock.close()

    def _tell(self, message: Mapping[str, Any], except_process: int = -1) -> None:
        for peer in self._peers:
            if peer.process != except_process and not peer.left:
                peer.send(message)

    def _run(self) -> None:
        """The watch's thread: reads, beats, and looks at the clock, four times per timeout."""
        tick_s = min(1.0, self._timeout_s / 4)
        next_beat = 0.0
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.sock, selectors.EVENT_READ, peer)
            while not self._closed.is_set() and not self.loss:
                for key, _ in selector.select(tick_s):
                    self._read(key.data, selector)
                if time.monotonic() >= next_beat:
                    self._tell({"type": "beat"})
                    next_beat = time.monotonic() + self._timeout_s / 4
                self._look_for_silence()
        if self.loss and not self._closed.is_set():
            self._on_loss(self.loss, self.code)

    def _read(self, peer: Peer, selector: selectors.BaseSelector) -> None:
        messages = peer.receive()
        if messages is None:
            selector.unregister(peer.sock)
            if not peer.left:
                self._lose(peer, "has died (its connection closed)")
            return
        for message in messages:
            self._handle(peer, message)

    def _handle(self, peer: Peer, message: Mapping[str, Any]) -> None:
        """Acts on one message and, in process 0, passes it on."""
        kind = message.get("type")
        if kind == "stop":
            self.stop_asked.set()
        elif kind == "bye":
            peer.left = True
        elif kind == "failed":
            self.code = message["code"]
            self.loss = f"process {message['process']} failed: {message['message']}"
            peer.left = True
        elif kind == "lost":
            self.loss = message["message"]
        if kind in ("stop", "failed", "lost") and self._process == 0:
            self._tell(message, except_process=peer.process)

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        for peer in self._peers:
            if not peer.left and now - peer.last_heard > self._timeout_s:
                self._lose(peer, f"has been silent for {self._timeout_s:g} s")

    def _lose(self, peer: Peer, what: str) -> None:
        if not self.loss:
            self.loss = f"process {peer.process} ({peer.host}) {what}"
            self._tell({"type": "lost", "message": self.loss}, except_process=peer.process)


def say(line: str) -> None:
    """Writes one line to stderr at once, whatever the buffers hold."""
    sys.stdout.flush()
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
