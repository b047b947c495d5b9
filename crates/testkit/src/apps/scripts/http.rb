# server PORT FILE: a thread for each connection; serves the file, and says the sum of what is sent to it. As many as come.
# client PORT FILE: Net::HTTP, kept and closed connections, and sockets by hand.
require 'socket'
require 'digest'
require 'net/http'
require 'timeout'

$stdout.sync = true
port, data = Integer(ARGV[1]), File.binread(ARGV[2])

def requests(connection, data)
  while (line = connection.gets)
    length = 0
    closing = false
    while (header = connection.gets) && header != "\r\n"
      length = header.split(':')[1].to_i if header.downcase.start_with?('content-length')
      closing = true if header.downcase =~ /\Aconnection:\s*close/
    end
    body = line.start_with?('POST') ? Digest::SHA256.hexdigest(connection.read(length)) : data
    connection.write("HTTP/1.1 200 OK\r\nContent-Length: #{body.bytesize}\r\n\r\n")
    connection.write(body)
    break if closing
  end
ensure
  connection.close
end

if ARGV[0] == 'server'
  trap('TERM') { exit!(0) }
  server = TCPServer.new('127.0.0.1', port)
  loop { Thread.new(server.accept) { |connection| requests(connection, data) } }
end

Timeout.timeout(40) do
  threads = (1..4).map do |n|
    Thread.new do
      Net::HTTP.start('127.0.0.1', port) do |http|
        3.times { raise 'another file' unless http.get('/').body == data }
        raise 'another sum' unless http.post('/', data).body == Digest::SHA256.hexdigest(data)
      end
      raise 'another file' unless Net::HTTP.get(URI("http://localhost:#{port}/")) == data if n > 2
    end
  end
  threads.each(&:join)
  begin
    TCPSocket.new('127.0.0.1', 1)
    raise 'a closed port answers'
  rescue Errno::ECONNREFUSED
    nil
  end
  # Without blocking, and by select.
  socket = TCPSocket.new('127.0.0.1', port)
  raise 'bytes from nowhere' unless socket.read_nonblock(1, exception: false) == :wait_readable
  socket.write("GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
  raise 'nothing came' unless IO.select([socket], nil, nil, 20)
  raise 'another end' unless socket.read.end_with?(data)
  # Datagrams.
  one, two = UDPSocket.new, UDPSocket.new
  one.bind('127.0.0.1', 0)
  two.send('ping', 0, '127.0.0.1', one.addr[1])
  text, from = one.recvfrom(100)
  one.send(text + from[1].to_s, 0, '127.0.0.1', from[1])
  raise 'another datagram' unless two.recvfrom(100)[0] == "ping#{two.addr[1]}"
end
puts 'ok'
