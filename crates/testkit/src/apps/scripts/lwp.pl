# lwp.pl PORT FILE: LWP with one kept connection, and without.
use strict;
use warnings;
use Digest::SHA qw(sha256_hex);
use LWP::UserAgent;

alarm 40;
my ($port, $file) = @ARGV;
open my $in, '<:raw', $file or die;
my $data = do { local $/; <$in> };
my $url = "http://127.0.0.1:$port/";
for my $agent (LWP::UserAgent->new(keep_alive => 4, timeout => 30), LWP::UserAgent->new(timeout => 30)) {
    for (1 .. 4) {
        my $answer = $agent->get($url);
        die $answer->status_line unless $answer->is_success;
        die 'another file' unless $answer->content eq $data;
    }
    my $sum = $agent->post($url, 'Content-Type' => 'application/octet-stream', Content => $data);
    die 'another sum' unless $sum->content eq sha256_hex($data);
}
die 'a closed port answers' if LWP::UserAgent->new->get('http://127.0.0.1:1/')->is_success;
print "ok\n";
