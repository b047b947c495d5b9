# server.pl PORT: a process for each connection, which answers each line reversed.
use strict;
use warnings;
use IO::Socket::INET;
use POSIX ();

$SIG{TERM} = sub { exit 0 };
$SIG{CHLD} = sub { 1 while waitpid(-1, POSIX::WNOHANG()) > 0 };
my $listener = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => $ARGV[0], Listen => 64, ReuseAddr => 1)
    or die "listen: $@";
while (1) {
    my $connection = $listener->accept or next;
    my $pid = fork // die "fork: $!";
    if ($pid == 0) {
        close $listener;
        while (my $line = <$connection>) {
            chomp $line;
            print $connection scalar(reverse $line), "\n";
        }
        exit 0;
    }
    close $connection;
}
