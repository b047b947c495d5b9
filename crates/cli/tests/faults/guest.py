#!/usr/bin/env python3
"""Guest programs of the fault tests: guest.py PROGRAM [ARGUMENT..]

Each tells on standard output, a line at a time, how far it is; lines on standard input let it go on.
"""

import ctypes
import errno
import mmap
import os
import random
import resource
import select
import socket
import struct
import sys
import threading
import time

HERE = "127.0.0.1"


def say(*words):
    # One write, so that lines of several processes and threads do not mix.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def told():
    """Waits for the test."""
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    return line.strip()


def name(error):
    return errno.errorcode.get(error.errno, str(error.errno))


def connect(port):
    s = socket.socket()
    s.connect((HERE, int(port)))
    return s


def listen(backlog=64, port=0):
    s = socket.socket()
    s.bind((HERE, port))
    s.listen(backlog)
    return s


def exactly(s, count):
    data = b""
    while len(data) < count:
        piece = s.recv(count - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def echoed(s, seed, count):
    data = random.Random(seed).randbytes(count)
    s.sendall(data)
    return exactly(s, count) == data


def bystander(port):
    """Transfers and checks data until standard input ends; an error of its connection is told."""
    s = connect(port)
    blocks = 0
    while not select.select([0], [], [], 0.002)[0]:
        try:
            if not echoed(s, blocks, 30000):
                return say("wrong data in block", blocks)
        except (OSError, EOFError) as e:
            return say("error", name(e) if isinstance(e, OSError) else "end of file")
        blocks += 1
        say("block", blocks)
    say("done", blocks)


def pump(s):
    """Traffic both ways, for ever."""
    try:
        while True:
            s.sendall(b"x" * 20000)
            exactly(s, 20000)
    except (OSError, EOFError):
        pass


def reflect(s):
    try:
        while data := s.recv(65536):
            s.sendall(data)
    except OSError:
        pass


def victim(port, connections, fork):
    """Has connections of all kinds until it is killed. The first byte of an accepted one says what it is for."""
    listener = listen()
    say("port", listener.getsockname()[1])
    work = []
    quiet = connect(port)
    quiet.sendall(b"q")
    for _ in range(2):
        work.append((pump, connect(port)))
    kept = []
    for _ in range(int(connections)):
        s, _ = listener.accept()
        role = exactly(s, 1)
        if role == b"r":
            work.append((reflect, s))
        elif role == b"d":
            # Never read: the test expects what the kernel does at a close with unread data.
            s.recv(1000, socket.MSG_PEEK | socket.MSG_WAITALL)
        kept.append(s)
    if fork == "fork" and os.fork() == 0:
        work = [(pump, connect(port))]
    for target, s in work:
        threading.Thread(target=target, args=(s,), daemon=True).start()
    say("ready")
    while True:
        listener.accept()


def vandal(port, seed, kind):
    """Fills its region with random bytes while it has connections and traffic."""
    connected = [connect(port) for _ in range(3)]
    listener = listen()
    say("port", listener.getsockname()[1])
    accepted, _ = listener.accept()
    epoll = select.epoll()
    epoll.register(accepted, select.EPOLLIN)
    threading.Thread(target=pump, args=(connected[0],), daemon=True).start()
    threading.Thread(target=reflect, args=(connected[1],), daemon=True).start()
    region, _, doorbell = map(int, os.environ["NETKERNEL_FDS"].split(","))
    # By the C library's own functions: GuestLib keeps its descriptors from the program's.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    base = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, region, 0)
    header = (ctypes.c_char * 4096).from_address(base)
    sockets, _, queue_sets, _, region_bytes = struct.unpack_from("<IIIQQ", header, 12)
    base = libc.mmap(None, region_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, region, 0)
    memory = (ctypes.c_char * region_bytes).from_address(base)
    sets_at = (4096 + sockets * 256 + 4095) & ~4095
    payload_at = (sets_at + queue_sets * 65536 + (2 << 20) - 1) & ~((2 << 20) - 1)
    say("ready")
    told()
    r = random.Random(int(seed))

    def fill(at, count):
        memory[at : at + count] = r.randbytes(count)

    def ring():
        libc.eventfd_write(doorbell, ctypes.c_uint64(1))

    def words(start, end, count):
        for _ in range(count):
            at = r.randrange(start, end - 8) & ~7
            fill(at, 8)

    for _ in range(200):
        if kind == "sockets":
            words(4096, 4096 + 40 * 256, 20)
            words(4096 + sockets // 2 * 256, 4096 + (sockets // 2 + 20) * 256, 10)
        elif kind == "queues":
            words(sets_at, sets_at + 6 * 65536, 40)
        elif kind == "header":
            words(64, 4096, 10)
        elif kind == "payload":
            fill(payload_at + r.randrange(64) * 65536, 65536)
        fill(192, 8)
        ring()
        time.sleep(0.0005)
    while True:
        # Everything but the payload, whose first 16 MiB do.
        for at in range(64, payload_at + (16 << 20), 1 << 20):
            fill(at, 1 << 20)
        ring()
        time.sleep(0.01)


def blocked_call(what, port, full_port):
    """One call that blocks; tells its result, and that of a new socket."""
    ident = f"{what} {os.getpid()} {threading.get_native_id()}"
    s = listener = None
    if what == "accept":
        listener = listen()
    elif what == "recvfrom":
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.bind((HERE, 0))
    elif what == "connect":
        s = socket.socket()
    else:
        s = connect(port)
    if what in ("epoll", "epoll-listener"):
        epoll = select.epoll()
        reader, _writer = os.pipe()
        epoll.register(reader, select.EPOLLIN)
        if what == "epoll-listener":
            listener = listen()
            epoll.register(listener, select.EPOLLIN | select.EPOLLET)
        else:
            epoll.register(s, select.EPOLLIN | select.EPOLLRDHUP)
    if what == "recv-timeout":
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 600, 0))
    say("waits", ident)
    result = "returned"
    try:
        if what in ("recv", "recv-timeout"):
            s.recv(10)
        elif what == "recv-waitall":
            s.recv(10, socket.MSG_WAITALL)
        elif what == "recvfrom":
            s.recvfrom(10)
        elif what == "accept":
            listener.accept()
        elif what == "send":
            while True:
                s.send(b"x" * 100000)
        elif what == "connect":
            s.connect((HERE, int(full_port)))
        else:
            if what == "poll":
                poll = select.poll()
                poll.register(s, select.POLLIN)
                events = poll.poll()
                result = "event" if events[0][1] & (select.POLLERR | select.POLLHUP) else f"events {events}"
            elif what == "select":
                result = "event" if select.select([s], [], []) == ([s], [], []) else "nothing"
            else:
                events = epoll.poll()
                result = "event" if events[0][1] & (select.EPOLLERR | select.EPOLLHUP) else f"events {events}"
            if listener:
                listener.setblocking(False)
                listener.accept()
            else:
                s.setblocking(False)
                s.recv(1)
            result += " returned"
    except OSError as e:
        result = f"{result} {name(e)}".removeprefix("returned ")
    try:
        socket.socket()
        after = "made"
    except OSError as e:
        after = name(e)
    say("result", what, result, "socket", after)


def blocked(how, port, full_port, *calls):
    """Blocks in all calls at once: `processes` or `threads`."""
    if how == "threads":
        threads = [threading.Thread(target=blocked_call, args=(c, port, full_port)) for c in calls]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    else:
        for c in calls:
            if os.fork() == 0:
                blocked_call(c, port, full_port)
                os._exit(0)
        for _ in calls:
            os.wait()
    say("over")


def memory(port, echo_port, count):
    """Fills the send side of many sockets, then has their receive side filled, then works on."""
    sockets = []
    for _ in range(int(count)):
        s = socket.socket()
        # Little in the kernel, so that the region fills.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        s.connect((HERE, int(port)))
        s.setblocking(False)
        sockets.append(s)
    errors, sent = set(), 0
    block = b"y" * 16384
    rounds_without = 0
    while rounds_without < 3:
        rounds_without += 1
        for s in sockets:
            try:
                while True:
                    sent += s.send(block)
                    rounds_without = 0
            except OSError as e:
                errors.add(name(e))
        time.sleep(0.05)
    say("sent", sent, ",".join(sorted(errors)))
    # Who blocks waits until there is memory.
    late = connect(echo_port)
    blocking = threading.Thread(target=lambda: say("late", echoed(late, 9, 30000)))
    blocking.start()
    told()
    # The peer has read all, and filled the other direction until nothing went any more.
    for s in sockets:
        s.shutdown(socket.SHUT_WR)
    epoll = select.epoll()
    of = {}
    for s in sockets:
        of[s.fileno()] = s
        epoll.register(s, select.EPOLLIN)
    received = 0
    while of:
        for fd, _ in epoll.poll():
            data = of[fd].recv(1 << 20)
            received += len(data)
            if not data:
                of.pop(fd).close()
    blocking.join()
    say("received", received)
    s = connect(echo_port)
    say("echoed", all(echoed(s, i, 30000) for i in range(50)))


def descriptors(echo_port, limit):
    """Runs out of its own descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))
    listener = listen()
    say("port", listener.getsockname()[1])
    told()
    # The test has connected once and waits for somebody to accept.
    select.select([listener], [], [])
    sockets = []
    try:
        while True:
            sockets.append(socket.socket())
    except OSError as e:
        say("socket", name(e), len(sockets))
    listener.setblocking(False)
    try:
        while True:
            sockets.append(listener.accept()[0])
    except OSError as e:
        say("accept", name(e))
    # As on Linux the connection waits on.
    for s in sockets[:8]:
        s.close()
    listener.setblocking(True)
    s, _ = listener.accept()
    say("accepted", exactly(s, 5).decode())
    s = connect(echo_port)
    say("echoed", echoed(s, 2, 30000))


def many(port, echo_port, count):
    """Wants more sockets than the engine has descriptors."""
    listener = listen()
    say("port", listener.getsockname()[1])
    before = connect(echo_port)
    sockets, errors = [], set()
    for _ in range(int(count)):
        try:
            s = socket.socket()
            sockets.append(s)
            s.connect((HERE, int(port)))
        except OSError as e:
            errors.add(name(e))
    say("connected", len(sockets), ",".join(sorted(errors)), echoed(before, 1, 30000))
    told()
    for s in sockets:
        s.close()
    s, _ = listener.accept()
    say("accepted", exactly(s, 5).decode())
    for i in range(20):
        s = connect(echo_port)
        if not echoed(s, i, 1000):
            return say("wrong data")
    say("echoed", True)


def idle(count):
    """Accepts and reflects, from an epoll set; tells when it has `count` connections, and when they have gone."""
    listener = listen(4096)
    listener.setblocking(False)
    say("port", listener.getsockname()[1])
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    of = {}
    full = False
    while True:
        for fd, _ in epoll.poll(maxevents=1024):
            if fd == listener.fileno():
                try:
                    while True:
                        s, _ = listener.accept()
                        of[s.fileno()] = s
                        epoll.register(s, select.EPOLLIN)
                except BlockingIOError:
                    pass
                if len(of) == int(count) and not full:
                    full = True
                    say("accepted", len(of))
                continue
            data = of[fd].recv(100)
            if data:
                of[fd].send(data)
            else:
                of.pop(fd).close()
                if not of:
                    return say("gone")


PATTERN = bytes(i * i % 251 for i in range(1 << 16))


def is_pattern(data, position):
    """Byte i of a stream is PATTERN[i % 65536]."""
    at = position % len(PATTERN)
    return (PATTERN * (len(data) // len(PATTERN) + 2))[at:at + len(data)] == data


def loaded(port):
    """Everything at once, until the stack is dead; each thread tells how far it came and what it was told then."""
    def sends(s):
        s.sendall(b"s")
        while True:
            s.sendall(PATTERN)
            yield

    def receives(s):
        s.sendall(b"r")
        position = 0
        while True:
            data = s.recv(100000)
            if not data:
                raise EOFError
            if not is_pattern(data, position):
                raise ValueError
            position += len(data)
            yield

    def asks(s):
        s.sendall(b"e")
        while True:
            if not echoed(s, 1, 64):
                raise ValueError
            yield

    def comes_and_goes(s):
        while True:
            s.sendall(b"e")
            if not echoed(s, 2, 100):
                raise ValueError
            s.close()
            s = connect(port)
            yield

    def run(what):
        rounds, end = 0, "?"
        try:
            for _ in what(connect(port)):
                rounds += 1
                if rounds == 1:
                    say("begun")
        except OSError as e:
            end = name(e)
        except (EOFError, ValueError) as e:
            end = type(e).__name__
        say("over", what.__name__, rounds, end)

    threads = [threading.Thread(target=run, args=[what])
               for what in (sends, receives, sends, receives, asks, comes_and_goes)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    try:
        connect(port)
        say("served")
    except OSError as e:
        say("then", name(e))


def hold(port):
    """Listens on `port` until told."""
    try:
        s = listen(port=int(port))
    except OSError as e:
        return say("error", name(e))
    say("port", s.getsockname()[1])
    told()


globals()[sys.argv[1]](*sys.argv[2:])
