#!/usr/bin/env python3
"""One of two guests that are joined in memory: peer.py server | client PORT | writer PORT | reader

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


def main(role, port=None):
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
