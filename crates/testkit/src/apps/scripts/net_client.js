// net_client.js PORT PORT2: 50 echoes at once with all compared, then connections that a child process serves.
const net = require('net'), crypto = require('crypto'), assert = require('assert');
const [port, handing] = process.argv.slice(2).map(Number);
function echo(size) {
  return new Promise((resolve, reject) => {
    const message = crypto.randomBytes(size);
    message[0] = 0x61;
    const pieces = [];
    const socket = net.connect(port, '127.0.0.1', () => { socket.end(message); });
    socket.setTimeout(20000, () => reject(new Error('timeout')));
    socket.on('data', piece => pieces.push(piece));
    socket.on('error', reject);
    socket.on('end', () => {
      try { assert(Buffer.concat(pieces).equals(message), 'echo differs'); resolve(); } catch (e) { reject(e); }
    });
  });
}
function handed(text) {
  return new Promise((resolve, reject) => {
    const socket = net.connect(handing, '127.0.0.1');
    let got = '', sent = false;
    socket.setTimeout(20000, () => reject(new Error('timeout')));
    socket.on('error', reject);
    socket.on('data', piece => {
      got += piece;
      if (!sent && got.endsWith(':')) { sent = true; socket.end(text); }
    });
    socket.on('end', () => resolve(got));
  });
}
function program() {
  return new Promise((resolve, reject) => {
    const socket = net.connect(port, '127.0.0.1', () => socket.write('$'));
    let got = '';
    socket.setTimeout(20000, () => reject(new Error('timeout')));
    socket.on('error', reject);
    socket.on('data', piece => { got += piece; });
    socket.on('end', () => resolve(got));
  });
}
async function main() {
  await Promise.all(Array.from({ length: 50 }, (_, i) => echo(1 + i * 1500)));
  await echo(4 << 20);
  const answers = await Promise.all(['one', 'two', 'three'].map(handed));
  answers.forEach((answer, i) => assert.match(answer, new RegExp(`^\\d+:${['one', 'two', 'three'][i]}$`)));
  for (const answer of await Promise.all([program(), program(), program()])) assert.strictEqual(answer, '42\n');
  console.log('ok');
}
main().catch(error => { console.error(error); process.exit(1); });
