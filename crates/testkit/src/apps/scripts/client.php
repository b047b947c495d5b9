<?php
// client.php PORT FILE: streams, stream_select over several, and what a closed port says.
[$_, $port, $file] = $argv;
$data = file_get_contents($file);
$url = "http://127.0.0.1:$port/";
for ($i = 0; $i < 5; $i++) {
    if (file_get_contents($url) !== $data) { fwrite(STDERR, "another file\n"); exit(1); }
}
$options = ['http' => ['method' => 'POST', 'content' => $data, 'header' => 'Content-Type: application/octet-stream']];
if (file_get_contents($url, false, stream_context_create($options)) !== hash('sha256', $data)) {
    fwrite(STDERR, "another sum\n");
    exit(1);
}
$open = [];
$got = [];
for ($i = 0; $i < 6; $i++) {
    $socket = stream_socket_client("tcp://127.0.0.1:$port", $number, $text, 20);
    stream_set_blocking($socket, false);
    fwrite($socket, "GET / HTTP/1.0\r\n\r\n");
    $open[$i] = $socket;
    $got[$i] = '';
}
while ($open) {
    $read = $open;
    $write = $except = null;
    if (!stream_select($read, $write, $except, 20)) { fwrite(STDERR, "nothing happens\n"); exit(1); }
    foreach ($read as $i => $socket) {
        $got[$i] .= fread($socket, 65536);
        if (feof($socket)) { fclose($socket); unset($open[$i]); }
    }
}
foreach ($got as $text) {
    if (!str_ends_with($text, $data)) { fwrite(STDERR, "cut off\n"); exit(1); }
}
if (@stream_socket_client('tcp://127.0.0.1:1', $number, $text, 5) || $number !== 111) {
    fwrite(STDERR, "a closed port says $number\n");
    exit(1);
}
echo "ok\n";
