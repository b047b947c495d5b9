"""asyncio_server.py PORT: echo."""
import asyncio, signal, sys

served = 0


async def echo(reader, writer):
    global served
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    writer.close()
    await writer.wait_closed()
    served += 1


async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = await asyncio.start_server(echo, "127.0.0.1", int(sys.argv[1]), backlog=256)
    await stop.wait()
    server.close()
    await server.wait_closed()
    print("served", served)


asyncio.run(main())
