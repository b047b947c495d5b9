"""http_client.py PORT PATH FILE THREADS ROUNDS: each thread gets PATH again and again over one connection."""
import http.client, sys, threading

port, path, file, threads, rounds = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
expected = open(file, "rb").read()
good = []


def work():
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    for _ in range(rounds):
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, answer.status
        assert body == expected, (len(body), len(expected))
        good.append(1)
    connection.close()


workers = [threading.Thread(target=work) for _ in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert len(good) == threads * rounds, len(good)
print("ok", len(good))
