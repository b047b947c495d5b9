"""subprocess_server.py PORT: for each connection a program is run, as its first byte says.

c: `cat`, with the connection as its standard input and output (as inetd does).
f: a program that must not have inherited any of the sockets; its list of descriptors is the answer.
p: a Python of its own that got the connection by pass_fds.
"""
import signal, socket, subprocess, sys

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=64)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
CHILD = """
import socket, sys
connection = socket.socket(fileno=int(sys.argv[1]))
assert connection.getpeername()[0] == "127.0.0.1"
while data := connection.recv(65536):
    connection.sendall(data)
"""
while True:
    connection, _ = listener.accept()
    connection.settimeout(20)
    with connection:
        what = connection.recv(1)
        connection.settimeout(None)
        if what == b"c":
            assert subprocess.Popen(["cat"], stdin=connection, stdout=connection).wait() == 0
        elif what == b"f":
            # ls itself opens one more than 0, 1, 2.
            done = subprocess.run(["ls", "/proc/self/fd"], close_fds=True, capture_output=True, check=True)
            connection.sendall(done.stdout)
        elif what == b"p":
            fd = connection.fileno()
            assert subprocess.run([sys.executable, "-c", CHILD, str(fd)], pass_fds=[fd]).returncode == 0
        else:
            raise SystemExit(f"bad request {what}")
