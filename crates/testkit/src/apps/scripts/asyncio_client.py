"""asyncio_client.py PORT CLIENTS ROUNDS: all at once; every echo is compared."""
import asyncio, random, sys

port, clients, rounds = map(int, sys.argv[1:4])


async def client(number):
    noise = random.Random(number)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sizes = [noise.choice((1, 17, 512, 4096, 20000)) for _ in range(rounds)]
    if number % 10 == 0:
        sizes.append(300_000)
    for size in sizes:
        message = noise.randbytes(size)

        async def send():
            writer.write(message)
            await writer.drain()

        # Both directions at once: a message may be larger than all buffers together.
        _, answer = await asyncio.gather(send(), reader.readexactly(size))
        assert answer == message
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    return len(sizes)


async def main():
    done = await asyncio.gather(*(client(n) for n in range(clients)))
    assert len(done) == clients
    print("ok", len(done))


asyncio.run(asyncio.wait_for(main(), 30))
