#!/bin/sh
# Makes a bootstrapped Debian or Ubuntu tree into the root file system of a sandbox.
#
# mmdebstrap runs it on the host, as root, with the tree as its argument, before it cleans up.
# CUBICLE_SOURCES names a file with the apt sources that the sandbox shall have.
set -eu

root=$1

chroot "$root" useradd --uid 1000 --user-group --groups sudo --create-home --shell /bin/bash user
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >"$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"

# The guest daemon sets the sandbox's own name, machine id and resolver when it comes to life.
echo sandbox >"$root/etc/hostname"
printf '127.0.0.1\tlocalhost sandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"
: >"$root/etc/machine-id"
: >"$root/etc/resolv.conf"
rm -f "$root/var/lib/dbus/machine-id"
printf 'LANG=C.UTF-8\n' >"$root/etc/default/locale"

# How the host reaches its mirrors is none of the sandbox's business.
rm -rf "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root/etc/apt/auth.conf" \
    "$root/etc/apt/auth.conf.d" "$root/etc/apt/sources.list" "$root/etc/apt/sources.list.d"
mkdir "$root/etc/apt/sources.list.d"
cp "$CUBICLE_SOURCES" "$root/etc/apt/sources.list.d/sandbox.sources"
chmod 0644 "$root/etc/apt/sources.list.d/sandbox.sources"
printf 'Acquire::Languages "none";\n' >"$root/etc/apt/apt.conf.d/90sandbox"

# A sandbox is thrown away: `pip install` may change the only Python that it has.
rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED

# Left by package scripts; the first boot of a machine would keep them for ever.
rm -rf "$root/var/log/apt" "$root/var/log/dpkg.log" "$root/var/log/bootstrap.log" \
    "$root/var/log/alternatives.log" "$root/var/cache/debconf" "$root/var/cache/ldconfig"
mkdir -p "$root/var/cache/debconf"
