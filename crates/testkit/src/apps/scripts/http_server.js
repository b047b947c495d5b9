// http_server.js PORT FILE: GET /file streams it; POST answers with the SHA-256 of the body.
const http = require('http'), fs = require('fs'), crypto = require('crypto');
const [port, file] = process.argv.slice(2);
const server = http.createServer((request, response) => {
  if (request.method === 'POST') {
    const hash = crypto.createHash('sha256');
    request.on('data', piece => hash.update(piece));
    request.on('end', () => response.end(hash.digest('hex')));
  } else if (request.url === '/file') {
    response.writeHead(200, { 'Content-Length': fs.statSync(file).size });
    fs.createReadStream(file).pipe(response);
  } else {
    response.end('hello ' + request.url);
  }
});
server.listen(+port, '127.0.0.1');
process.on('SIGTERM', () => { server.close(() => process.exit(0)); server.closeAllConnections(); });
