#!/bin/sh
# Runs a program inside a bootstrapped tree:
#
#     enter.sh TREE WORK USER PROGRAM [ARGUMENT]...
#
# It is started in mount and process namespaces of its own, so what it mounts and starts ends with
# it. WORK/run is /run inside and WORK/tmp is /tmp: nothing that is left there gets into an image.
# The program is root among the tree's files and nothing more; it cannot get out of the tree.
set -eu

tree=$1 work=$2 user=$3
shift 3

# Read-only: what is in /proc/sys belongs to the whole host.
mount -t proc -o ro,nosuid,nodev,noexec proc "$tree/proc"
mount -t tmpfs -o nosuid,noexec,mode=0755,size=1m dev "$tree/dev"
for device in null zero full random urandom; do
    : >"$tree/dev/$device"
    mount --bind "/dev/$device" "$tree/dev/$device"
done
mkdir "$tree/dev/shm"
mount -t tmpfs -o nosuid,nodev,noexec,mode=1777,size=64m shm "$tree/dev/shm"
ln -s /proc/self/fd "$tree/dev/fd"
mount --bind "$work/run" "$tree/run"
mount --bind "$work/tmp" "$tree/tmp"

# How the host finds its registries.
mount --bind "$work/resolv.conf" "$tree/etc/resolv.conf"
mount --bind "$work/hosts" "$tree/etc/hosts"

cd "$tree"
if [ "$user" = root ]; then
    exec chroot "$tree" setpriv --no-new-privs --inh-caps=-all \
        --bounding-set=-all,+chown,+dac_override,+fowner,+fsetid -- "$@"
else
    exec chroot "$tree" setpriv --no-new-privs --inh-caps=-all --bounding-set=-all \
        --reuid="$user" --regid="$user" --init-groups -- "$@"
fi
