# daemon.pl PORT FILE: HTTP::Daemon; serves the file, and says the sum of what is sent to it.
use strict;
use warnings;
use Digest::SHA qw(sha256_hex);
use HTTP::Daemon;
use HTTP::Response;

my ($port, $file) = @ARGV;
$SIG{TERM} = sub { exit 0 };
$SIG{CHLD} = 'IGNORE';
open my $in, '<:raw', $file or die;
my $data = do { local $/; <$in> };
my $daemon = HTTP::Daemon->new(LocalAddr => '127.0.0.1', LocalPort => $port, ReuseAddr => 1, Listen => 64) or die "listen: $@";
while (1) {
    my $connection = $daemon->accept or next;
    defined(my $pid = fork) or die "fork: $!";
    if (!$pid) {
        while (my $request = $connection->get_request) {
            my $answer = $request->method eq 'POST' ? sha256_hex($request->content) : $data;
            $connection->send_response(HTTP::Response->new(200, 'OK', [], $answer));
        }
        exit 0;
    }
    $connection->close;
}
