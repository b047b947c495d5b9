"""mp_server.py PORT fork|spawn|pass: an echo by three processes that answer with their number.

fork: they inherit the listener. spawn: they are new programs that inherit it. pass: the parent accepts and sends them the
connections over a Unix socket.
"""
import multiprocessing, os, signal, socket, sys


def serve(connection):
    connection.settimeout(20)
    with connection:
        while data := connection.recv(65536):
            connection.sendall(b"%d:" % os.getpid() + data)


def accept(listener):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        connection, _ = listener.accept()
        serve(connection)


def receive(pipe):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        serve(pipe.recv())


def stop(*_):
    raise KeyboardInterrupt


def main():
    port, how = int(sys.argv[1]), sys.argv[2]
    context = multiprocessing.get_context("fork" if how == "fork" else "spawn")
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    pipes = []
    workers = []
    for _ in range(3):
        if how == "pass":
            ours, theirs = context.Pipe()
            pipes.append(ours)
            worker = context.Process(target=receive, args=(theirs,))
        else:
            worker = context.Process(target=accept, args=(listener,))
        worker.start()
        workers.append(worker)
    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    try:
        number = 0
        while how == "pass":
            connection, _ = listener.accept()
            pipes[number % 3].send(connection)
            connection.close()
            number += 1
        signal.pause()
    except KeyboardInterrupt:
        pass
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for worker in workers:
        worker.terminate()
        worker.join()
        assert worker.exitcode == -signal.SIGTERM, worker.exitcode


if __name__ == "__main__":
    main()
