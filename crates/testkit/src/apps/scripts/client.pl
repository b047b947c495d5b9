# client.pl PORT: 20 connections in one select loop, 20 lines over each.
use strict;
use warnings;
use IO::Select;
use IO::Socket::INET;

alarm 25;
my ($select, %left, $good) = (IO::Select->new, (), 0);
my %state;
for my $number (1 .. 20) {
    my $socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $ARGV[0]) or die "connect: $@";
    $select->add($socket);
    $state{$socket} = { left => 20, sent => "line $number of 20 " . ('x' x (50 * $number)), got => '' };
    print $socket "$state{$socket}{sent}\n";
}
while ($select->count) {
    for my $socket ($select->can_read) {
        my $state = $state{$socket};
        sysread($socket, my $piece, 4096) or die "cut off";
        $state->{got} .= $piece;
        next unless $state->{got} =~ /\n\z/;
        die "wrong answer" unless $state->{got} eq reverse($state->{sent}) . "\n";
        $state->{got} = '';
        $good++;
        if (--$state->{left}) {
            $state->{sent} .= $state->{left};
            print $socket "$state->{sent}\n";
        } else {
            $select->remove($socket);
            close $socket;
        }
    }
}
die "only $good" unless $good == 400;
print "ok\n";
