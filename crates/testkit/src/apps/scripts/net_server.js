// net_server.js PORT: an echo; a connection whose first byte is '!' is handed to a child process, which goes on with it.
const net = require('net'), child_process = require('child_process');
if (process.argv[2] === 'child') {
  process.on('message', (message, socket) => {
    if (!socket) return;
    socket.write(`${process.pid}:`);
    socket.on('data', data => socket.write(data));
    socket.on('end', () => socket.end());
    socket.resume();
  });
  process.on('disconnect', () => process.exit(0));
} else {
  const child = child_process.fork(__filename, ['child']);
  const server = net.createServer({ allowHalfOpen: true, pauseOnConnect: false }, socket => {
    socket.on('error', error => { console.error(error); process.exit(1); });
    socket.once('data', first => {
      if (first[0] === 0x21) {
        socket.pause();
        socket.removeAllListeners();
        child.send('socket', socket);
      } else if (first[0] === 0x24) {
        // A program of its own answers.
        child_process.execFile('sh', ['-c', 'echo $((6 * 7))'], (error, out) => socket.end(error ? 'error' : out));
      } else {
        socket.write(first);
        socket.pipe(socket);
      }
    });
  });
  server.listen(+process.argv[2], '127.0.0.1', 256);
  process.on('SIGTERM', () => {
    child.on('exit', code => process.exit(code));
    child.disconnect();
    server.close();
  });
}
