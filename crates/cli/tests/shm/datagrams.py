#!/usr/bin/env python3
"""One of two guests that send each other datagrams: datagrams.py echo | asker PORT ROUNDS | flood PORT | silent

`echo` sends back what comes. `asker` asks so many times with datagrams of many sizes, and checks what comes back, and from where;
then it says `asked BYTES`, asks once more for each line, and says what it got, or the errno's name. `flood` sends as fast as it
can, and says so once a thousand are out; `silent` reads nothing until it is given a line, and then says how many came, and
whether each was whole and in order.
"""

import errno
import os
import random
import socket
import sys


def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def bound():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("127.0.0.1", 0))
    say("port", s.getsockname()[1])
    return s


def echo():
    s = bound()
    while True:
        data, peer = s.recvfrom(65536)
        s.sendto(data, peer)


def asker(port, rounds):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect(("127.0.0.1", int(port)))
    assert s.getsockname()[0] == "127.0.0.1" and s.getpeername()[1] == int(port)
    sizes, total = random.Random(5), 0
    for _ in range(int(rounds)):
        n = sizes.choice((0, 1, 64, 1400, 9000, 65507))
        data = sizes.randbytes(n)
        assert s.send(data) == n
        got, peer = s.recvfrom(65536)
        assert got == data and peer == s.getpeername(), (n, len(got), peer)
        total += n
    try:
        s.send(bytes(65508))
        s.recv(1)
        assert False
    except OSError as error:
        assert error.errno == errno.EMSGSIZE, error
    say("asked", total)
    for line in sys.stdin.buffer:
        try:
            s.send(line.strip())
            say("got", s.recv(65536).decode())
        except OSError as error:
            say("got", errno.errorcode[error.errno])


def flood(port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    n = 0
    while True:
        s.sendto(b"%09d" % n * 20, ("127.0.0.1", int(port)))
        n += 1
        if n == 1000:
            say("flooding")


def silent():
    s = bound()
    sys.stdin.readline()
    s.setblocking(False)
    numbers, whole = [], True
    try:
        while True:
            data = s.recv(65536)
            whole &= data == data[:9] * 20
            numbers.append(int(data[:9]))
    except BlockingIOError:
        pass
    say("came", len(numbers), whole and numbers == sorted(set(numbers)) and numbers[0] == 0)


{"echo": echo, "asker": asker, "flood": flood, "silent": silent}[sys.argv[1]](*sys.argv[2:])
