"""echo_client.py PORT SERVERS CLIENTS ROUNDS: an echo whose answers begin with the number of the process and a colon.

SERVERS connections are open at once at first: each must be answered by another process.
"""
import os, socket, sys, threading

port, servers, clients, rounds = map(int, sys.argv[1:5])


def talk(connection, message):
    connection.sendall(message)
    answer = b""
    while b":" not in answer or len(answer) < len(message) + answer.index(b":") + 1:
        piece = connection.recv(65536)
        assert piece, f"cut off after {len(answer)} of {len(message)}"
        answer += piece
    who, body = answer.split(b":", 1)
    assert body == message
    return who


def connect():
    return socket.create_connection(("127.0.0.1", port), timeout=20)


open_ones = [connect() for _ in range(servers)]
who = {talk(c, b"who are you?") for c in open_ones}
assert len(who) == servers, who
for connection in open_ones:
    connection.close()

good = []


def client():
    with connect() as connection:
        for number in range(rounds):
            talk(connection, os.urandom(100 + 40 * number))
    good.append(1)


threads = [threading.Thread(target=client) for _ in range(clients)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(good) == clients, len(good)
print("ok", len(who))
