#!/usr/bin/env python3
"""One of two guests that are joined in memory: peer.py server | client PORT | writer PORT | reader | echo | asker PORT |
hostile PORT | bulk-reader | bulk-writer PORT

`echo` serves whoever comes; `asker` says what it got for each line that it is given; `hostile` writes random bytes all over the
memory that it shares with the server, again and again, while it uses its connection.

Both send a stream that is known at each position, as fast as they can, and check what they get. The last line tells how
that ended: `over OUTCOME BYTES`, where OUTCOME is `end`, or the errno's name, or `corrupt`.
"""

import errno
import os
import random
import select
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


BULK = 8_000_000


def bulk_reader():
    """Reads in all ways as fast as it can, and looks at what came now and then."""
    listener = socket.create_server(("127.0.0.1", 0))
    say("port", listener.getsockname()[1])
    s, _ = listener.accept()
    say("ready")
    room, ways, ended = memoryview(bytearray(BULK)), random.Random(), False
    expected = (PATTERN * (BULK // len(PATTERN) + 1))[:BULK]
    while not ended:
        got, peeks = 0, []
        while got < BULK and not ended:
            way, most = ways.randrange(16), min(BULK - got, 400000)
            if way == 0:
                peeks.append((got, s.recv(ways.randrange(1, 300000), socket.MSG_PEEK)))
            if way == 1:
                select.select([s], [], [])
                try:
                    n = s.recv_into(room[got:], most, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    return say("nothing there after select at", got)
            elif way == 2:
                cut = got + most // 3
                n = s.recvmsg_into([room[got:cut], room[cut : got + most]])[0]
            elif way == 3:
                n = s.recv_into(room[got:], min(most, ways.randrange(1, 3000)))
            elif way == 4:
                n = s.recv_into(room[got:], most, socket.MSG_WAITALL)
            else:
                n = s.recv_into(room[got:], most)
            got, ended = got + n, n == 0
        if room[:got] != expected[:got]:
            return say("corrupt")
        for at, peeked in peeks:
            if peeked != expected[at : at + len(peeked)] and at + len(peeked) <= BULK:
                return say("corrupt peek at", at)
        say("over end" if ended else "right")


def bulk_writer(port):
    s = socket.create_connection(("127.0.0.1", int(port)))
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
    data = memoryview((PATTERN * (BULK // len(PATTERN) + 1))[:BULK])
    sizes, buffer = random.Random(), memoryview(bytearray(300000))
    while not over.is_set():
        at = 0
        while at < BULK:
            n = min(sizes.choice((5000, 65536, 131072, 131072, 131072, 300000)), BULK - at)
            buffer[:n] = data[at : at + n]
            s.setblocking(sizes.random() < 0.7)
            done = 0
            while done < n:
                try:
                    done += s.send(buffer[done:n])
                except BlockingIOError:
                    select.select([], [s], [])
            at += n
            # What was written is written, whatever becomes of the buffer.
            buffer[:n] = bytes(n)
    s.close()


def main(role, port=None):
    if role == "bulk-reader":
        return bulk_reader()
    if role == "bulk-writer":
        return bulk_writer(port)
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
