#!/bin/sh
# Becomes systemd as the first process of a machine of its own: boot.sh PLACE, by `unshare` in new namespaces of all kinds.
# Its file system is that of the host, with a layer in memory over it, so that nothing that happens there is left behind. What
# PLACE/layer holds is put into that layer. systemd's own log is PLACE/kmsg.
set -eu
place=$1

mount --make-rprivate /
mkdir "$place/base"
mount -t tmpfs tmpfs "$place/base"
mkdir "$place/base/upper" "$place/base/work" "$place/base/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$place/base/upper,workdir=$place/base/work" "$place/base/root"
root=$place/base/root

mount -t proc proc "$root/proc"
# Most of it is the host's.
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
# Nothing of the host's is started: its kernel would be set up once more.
for dir in run tmp var/log etc/systemd/system lib/systemd/system-generators lib/systemd/system/sysinit.target.wants; do
    mount -t tmpfs -o mode=755 tmpfs "$root/$dir"
done
chmod 1777 "$root/tmp"

mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/shm" "$root/dev/pts" "$root/dev/net"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for device in null zero full random urandom tty net/tun; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
# Of the host's, nothing is written.
touch "$place/kmsg" "$root/dev/kmsg"
mount --bind "$place/kmsg" "$root/dev/kmsg"

cp -R "$place/layer/." "$root/"
cat >"$root/etc/systemd/system/machine.target" <<'END'
[Unit]
Description=All that this machine has
Wants=systemd-journald.service
END

ip link set lo up
mkdir "$root/host"
cd "$root"
pivot_root . host
umount -l /host
# As at a real start: what is mounted later is seen by services, too.
mount --make-rshared /
exec env -i container=netkernel-test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=machine.target --log-target=kmsg --show-status=no
