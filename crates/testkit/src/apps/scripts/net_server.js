// net_server.js PORT PORT2: an echo, or the answer of a program; connections to PORT2 are handed to a child process.
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
  const server = net.createServer({ allowHalfOpen: true }, socket => {
    socket.on('error', error => { console.error(error); process.exit(1); });
    socket.once('data', first => {
      if (first[0] === 0x24) {
        // A program of its own answers.
        child_process.execFile('sh', ['-c', 'echo $((6 * 7))'], (error, out) => socket.end(error ? 'error' : out));
      } else {
        socket.write(first);
        socket.pipe(socket);
      }
    });
  });
  server.listen(+process.argv[2], '127.0.0.1', 256);
  // Paused: what comes is for the child to read.
  const handing = net.createServer({ pauseOnConnect: true }, socket => child.send('socket', socket));
  handing.listen(+process.argv[3], '127.0.0.1');
  process.on('SIGTERM', () => {
    child.on('exit', code => process.exit(code));
    child.disconnect();
    server.close();
    handing.close();
  });
}
