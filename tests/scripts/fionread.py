"""A server as nginx reads: edge-triggered, and after a read that fills its buffer it asks how much more there is (FIONREAD); told that there is
nothing, it waits for the next event. Answers each message, four bytes of length before it, with as many bytes. `client HOST PORT PAUSE` sends
small messages and then others of sizes that go another way, one byte at a time among them, and wants each answered in time. Before the first of
those it pauses so many seconds."""

import fcntl
import select
import socket
import struct
import sys
import termios
import time

BUFFER = 8192
SIZES = [1, 17_000, 100_000, 300_000, 600_000, 5]


def unread(sock):
    return struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4))[0]


class Reader:
    """Reads all there is, as far as it is told."""

    def __init__(self, sock):
        self.sock, self.data = sock, bytearray()
        self.epoll = select.epoll()
        self.epoll.register(sock, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def wait(self, seconds):
        if not self.epoll.poll(seconds):
            return None
        while True:
            try:
                piece = self.sock.recv(BUFFER)
            except BlockingIOError:
                return True
            if not piece:
                return False
            self.data += piece
            if len(piece) < BUFFER or unread(self.sock) == 0:
                return True


def send(sock, data):
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view):]
        except BlockingIOError:
            select.select([], [sock], [])


def serve(port):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        sock, _ = listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = Reader(sock)
        while reader.wait(None) is not False:
            while len(reader.data) >= 4:
                size = struct.unpack("!I", reader.data[:4])[0]
                if len(reader.data) < 4 + size:
                    break
                del reader.data[:4 + size]
                send(sock, b"x" * size)
        sock.close()


def ask(reader, size, whole):
    message = struct.pack("!I", size) + b"y" * size
    pieces = [message] if whole else [message[:4]] + [message[at:at + 1] for at in range(4, 4 + size)]
    for piece in pieces:
        send(reader.sock, piece)
    until = time.monotonic() + 3
    while len(reader.data) < size:
        if time.monotonic() > until:
            sys.exit(f"{len(reader.data)} of {size} bytes were told of in time")
        reader.wait(0.1)
    del reader.data[:size]


def client(host, port, pause):
    sock = socket.create_connection((host, port))
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    reader = Reader(sock)
    for _ in range(3):
        # Long enough to be found fit.
        for _ in range(200):
            ask(reader, 60, True)
            time.sleep(0.002)
        time.sleep(pause)
        pause = 0
        for size in SIZES:
            ask(reader, size, size > 5)
            ask(reader, 60, True)
    print("done")


if sys.argv[1] == "serve":
    serve(int(sys.argv[2]))
else:
    client(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
