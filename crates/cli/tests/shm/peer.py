#!/usr/bin/env python3
"""One of two guests that are joined in memory: peer.py server | client PORT | writer PORT | reader | echo | asker PORT |
hostile PORT

`echo` serves whoever comes; `asker` says what it got for each line that it is given; `hostile` writes random bytes all over the
memory that it shares with the server, again and again, while it uses its connection.

Both send a stream that is known at each position, as fast as they can, and check what they get. The last line tells how
that ended: `over OUTCOME BYTES`, where OUTCOME is `end`, or the errno's name, or `corrupt`.
"""

import errno
import os
import random
import socket
import sys
import threading

PATTERN = random.Random(4).randbytes(65521)


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def pattern(at, count):
    at %= len(PATTERN)
    return (PATTERN * (count // len(PATTERN) + 2))[at : at + count]


def send(s):
    at, sizes = 0, random.Random()
    try:
        while True:
            n = sizes.choice((1, 64, 1000, 5000, 70000))
            s.sendall(pattern(at, n))
            at += n
    except OSError:
        pass


def receive(s):
    got, told = 0, False
    while True:
        try:
            data = s.recv(100000)
        except OSError as error:
            return say("over", errno.errorcode[error.errno], got)
        if not data:
            return say("over", "end", got)
        if data != pattern(got, len(data)):
            return say("over", "corrupt", got)
        got += len(data)
        if not told:
            told = True
            say("ready")


def echo():
    listener = socket.create_server(("127.0.0.1", 0))
    say("port", listener.getsockname()[1])

    def serve(s):
        try:
            while data := s.recv(100000):
                s.sendall(data)
        except OSError:
            pass

    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


def asker(port):
    s = socket.create_connection(("127.0.0.1", int(port)))
    for line in sys.stdin.buffer:
        s.sendall(line)
        got = b""
        while len(got) < len(line):
            got += s.recv(100)
        say("got", got.decode().strip())


def hostile(port):
    s = socket.create_connection(("127.0.0.1", int(port)))
    s.sendall(b"hello")
    assert s.recv(5) == b"hello"
    s.settimeout(0.01)
    with open("/proc/self/maps") as maps:
        line = next(line for line in maps if "netkernel-pair" in line)
    begin = int(line.split("-")[0], 16)
    memory = os.open("/proc/self/mem", os.O_RDWR)
    for turn in range(2000):
        # Positions, flags and marks of the first connections; what a correct guest writes comes between.
        at, n = random.randrange(4096, 4096 + 1024), random.randrange(1, 512)
        os.pwrite(memory, random.randbytes(n), begin + at)
        if turn % 20 == 0:
            try:
                s.send(random.randbytes(70000))
                s.recv(100000)
            except OSError:
                pass
    say("done")


def main(role, port=None):
    if role in ("echo", "asker", "hostile"):
        return {"echo": echo, "asker": asker, "hostile": hostile}[role](*[port] if port else [])
    if role in ("server", "reader"):
        listener = socket.create_server(("127.0.0.1", 0))
        say("port", listener.getsockname()[1])
        s, peer = listener.accept()
        assert s.getpeername() == peer
        if role == "reader":
            say("accepted", peer[1])
            sys.stdin.readline()
    else:
        s = socket.create_connection(("127.0.0.1", int(port)))
        if role == "writer":
            s.sendall(pattern(0, 20000))
            say("written")
            sys.stdin.readline()
    if role in ("server", "client"):
        threading.Thread(target=send, args=(s,), daemon=True).start()
    receive(s)


main(*sys.argv[1:])
