"""A client with Python's plain sockets: what an ordinary script sees of its connection.

usage: client.py HOST PORT BYTES blocking|nonblocking|timeout
Exchanges BYTES patterned bytes both ways with the probe server and prints one JSON object.
"""
import json
import select
import socket
import sys
import threading


def pattern(start, n):
    return bytes(((p * 31) ^ (p >> 8) ^ (p >> 16)) & 0xFF for p in range(start, start + n))


def main():
    host, port, total, mode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    if mode == "nonblocking":
        s.setblocking(False)
        assert s.connect_ex((host, port)) in (0, 115)
        _, writable, _ = select.select([], [s], [], 10)
        assert writable and s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    else:
        s.connect((host, port))
    if mode == "timeout":
        s.settimeout(20)
    peername, sockname = s.getpeername()[:2], s.getsockname()[:2]
    data = pattern(0, total)
    if mode == "nonblocking":
        received = exchange_nonblocking(s, b"exchange %d\n" % total + data)
    else:
        received = exchange_blocking(s, b"exchange %d\n" % total + data)
    line = json.loads(received[total:])
    print(json.dumps({"peername": peername, "sockname": sockname, "intact": received[:total] == data, "server": line}))


def exchange_blocking(s, data):
    def send():
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)

    threading.Thread(target=send).start()
    received = bytearray()
    while piece := s.recv(65536):
        received += piece
    return bytes(received)


def exchange_nonblocking(s, data):
    received, sent, finished = bytearray(), 0, False
    while True:
        readable, writable, _ = select.select([s], [] if finished else [s], [], 20)
        assert readable or writable, "no progress"
        if writable:
            if sent < len(data):
                sent += s.send(data[sent : sent + 32768])
            else:
                s.shutdown(socket.SHUT_WR)
                finished = True
        if readable:
            piece = s.recv(65536)
            if not piece:
                return bytes(received)
            received += piece


main()
