#!/usr/bin/env bash
# Removes everything that Cubicle has put on this machine: templates, snapshots, sandboxes, mounts,
# networks. The packages that were installed for it stay.
#
#   deploy/uninstall.sh [--yes]
#
# CUBICLE_DATA_DIR names the data directory (/var/lib/cubicle).
set -euo pipefail

readonly DATA_DIR=${CUBICLE_DATA_DIR:-/var/lib/cubicle}
# What belongs to the usual data directory is called `cubicle`; what belongs to another one, `cub` and
# five digits that stand for it.
readonly NAME='cub(icle|[0-9a-f]{5})'
readonly RUN_DIRS='/run/cubicle(-[a-z0-9]+)?'
readonly BIN=/usr/local/bin/cubicle
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
# The VMs run under user ids of their own, one for each network slot, from here on.
readonly VM_UIDS=200000
readonly VM_UIDS_END=265536

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

((EUID == 0)) || die "this needs root"
[[ $DATA_DIR == /?*/?* && $DATA_DIR != *..* ]] || die "$DATA_DIR does not look like a data directory of Cubicle"
if running=$(pgrep -x cubicle); then
    die "Cubicle is running (process ${running//$'\n'/, }): stop it first, with Ctrl-C or kill"
fi

if [[ ${1:-} != --yes ]]; then
    [[ -t 0 ]] || die "say --yes to remove $DATA_DIR with all templates, snapshots and sandboxes"
    read -rp "Remove $DATA_DIR with all templates, snapshots and sandboxes? [y/N] " answer
    [[ $answer == [yY]* ]] || exit 1
fi

# VMs that were kept running, or that outlived a crash.
while read -r pid uid program; do
    if ((uid >= VM_UIDS && uid < VM_UIDS_END)) && [[ $program == qemu-system* ]]; then
        kill -KILL "$pid"
        while [[ -e /proc/$pid ]]; do sleep 0.05; done
    fi
done < <(ps -eo pid=,uid=,comm=)

# Everything mounted below the directories, the last mounted first. A slot's links go with its network
# namespace.
mounts() {
    findmnt --noheadings --raw --output TARGET |
        awk -v data="$DATA_DIR/" -v run="^$RUN_DIRS/" 'index($0, data) == 1 || $0 ~ run'
}
while read -r target; do
    # Some go with others. What stays is found below.
    umount --lazy "$target" || true
done < <(mounts | tac)

while read -r _ family table; do
    nft delete table "$family" "$table"
done < <(nft list tables | grep -E "^table [a-z0-9]+ $NAME\$" || true)
while read -r link; do
    # The other end of a pair has gone with the first.
    ip link delete "$link" 2>/dev/null || true
done < <(ip -o link show | sed 's/^[0-9]*: //; s/[:@].*//' | grep -E "^$NAME-[0-9]+\$" || true)
find /sys/fs/cgroup -depth -type d -name 'cubicle*' -exec rmdir --ignore-fail-on-non-empty {} + 2>/dev/null || true

# Never through a mount: it may be anything.
if left=$(mounts) && [[ -n $left ]]; then
    die "still mounted: ${left//$'\n'/, }"
fi
for directory in "$DATA_DIR" /run/cubicle /run/cubicle-*; do
    [[ -d $directory ]] || continue
    find "$directory" -mindepth 1 -maxdepth 1 -exec rm -rf {} +
    # It stays if it is a file system of its own.
    rmdir "$directory" 2>/dev/null || true
done
[[ -L $BIN ]] && rm -f "$BIN"
echo "Cubicle is gone from this machine. Packages that were installed for it have stayed."
