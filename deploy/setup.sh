#!/usr/bin/env bash
# Installs what Cubicle needs on a Debian or Ubuntu machine. When all of it is there already, it
# says nothing and takes a few hundredths of a second.
#
#   deploy/setup.sh           what building and running need (make up)
#   deploy/setup.sh --test    and what the tests need besides (make test)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Administrators' programs are not on everybody's PATH; rustup's are not on root's.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:$HOME/.cargo/bin

# The first QEMU that maps memory images read-only, so that VMs cannot write to what they share.
readonly QEMU_WANTED=8.2
# The first QEMU that works at all.
readonly QEMU_NEEDED=7.2
# Says that this machine has the newest QEMU that it can get, however old that is.
readonly QEMU_SETTLED=target/.qemu-is-newest
readonly BACKPORTS_FILE=/etc/apt/sources.list.d/cubicle-backports.sources

# Program that must be found, and the package that has it.
readonly RUN_PROGRAMS=(
    qemu-system-x86_64:qemu-system-x86
    mmdebstrap:mmdebstrap
    mke2fs:e2fsprogs
    mkfs.xfs:xfsprogs
    nft:nftables
    ip:iproute2
    losetup:mount
    pgrep:procps
    unshare:util-linux
    cc:build-essential
    pkg-config:pkg-config
)
readonly TEST_PROGRAMS=(
    conntrack:conntrack
    cpio:cpio
    git:git
    gzip:gzip
    lz4:lz4
    npm:npm
    python3:python3
    shellcheck:shellcheck
    xz:xz-utils
    zstd:zstd
)

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
die() {
    printf '\033[1;31merror:\033[0m %s\n' "$1" >&2
    shift
    if (($# > 0)); then printf '  %s\n' "$@" >&2; fi
    exit 1
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    elif type -P sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root: $*" "run it as root, or install sudo"
    fi
}

apt_get() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@"; }

updated=no
update_lists() {
    [[ $updated == yes ]] && return
    say "refreshing the package lists"
    apt_get update
    updated=yes
}

# at_least VERSION WANTED
at_least() { [[ $(printf '%s\n' "$1" "$2" | sort -V | head -n 1) == "$2" ]]; }

qemu_version() { qemu-system-x86_64 --version | sed -n '1s/.*version \([0-9.]*\).*/\1/p'; }

# Version of a package in a suite, or in any, with neither epoch nor revision.
candidate() {
    apt-cache madison qemu-system-x86 | awk -F' *[|] *' -v suite="${1:-}" '$3 ~ suite { print $2 }' |
        sed 's/^[0-9]*://; s/[+-].*//' | sort -V | tail -n 1
}

check_system() {
    local id='' id_like='' codename='' name=''
    if [[ -r /etc/os-release ]]; then
        # shellcheck source=/dev/null
        . /etc/os-release
        id=${ID:-} id_like=${ID_LIKE:-} codename=${VERSION_CODENAME:-} name=${PRETTY_NAME:-}
    fi
    [[ " $id $id_like " == *' debian '* || " $id $id_like " == *' ubuntu '* ]] ||
        die "Cubicle runs on Debian and Ubuntu; this is ${name:-an unknown system}"
    [[ $(uname -m) == x86_64 ]] || die "Cubicle runs on x86-64; this machine is $(uname -m)"
    release=$codename
    distribution=$id
}

# Adds the release's backports suite, on the mirror that the release itself comes from.
add_backports() {
    local suite=$release-backports uri keyring
    [[ $distribution == debian ]] || return 0
    if apt-cache policy | grep -q "n=$suite,"; then return; fi
    uri=$(apt-get indextargets --format "\$(RELEASE) \$(CODENAME) \$(COMPONENT) \$(REPO_URI)" \
        'Created-By: Packages' |
        awk -v release="$release" '($1 == release || $2 == release) && $3 == "main" { print $4; exit }')
    [[ -n $uri ]] || return 0
    say "adding the suite $suite, which has a newer QEMU, as $BACKPORTS_FILE"
    keyring=/usr/share/keyrings/debian-archive-keyring
    if [[ -e $keyring.gpg ]]; then keyring=$keyring.gpg; else keyring=$keyring.pgp; fi
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' \
        "$uri" "$suite" "$keyring" | as_root tee "$BACKPORTS_FILE" >/dev/null
    if ! apt_get update; then
        say "this mirror has no $suite: going on without it"
        as_root rm -f "$BACKPORTS_FILE"
        apt_get update
    fi
    updated=yes
}

install_qemu() {
    check_system
    update_lists
    local from=()
    if ! at_least "$(candidate)" "$QEMU_WANTED"; then add_backports; fi
    local backported
    backported=$(candidate "$release-backports")
    if [[ -n $backported ]] && ! at_least "$(candidate "$release/")" "$QEMU_WANTED"; then
        from=(--target-release "$release-backports")
    fi
    say "installing QEMU"
    apt_get install -y --no-install-recommends "${from[@]}" qemu-system-x86
    at_least "$(qemu_version)" "$QEMU_NEEDED" ||
        die "QEMU $(qemu_version) is too old: Cubicle needs $QEMU_NEEDED, and $QEMU_WANTED for all it can do" \
            "upgrade to a newer release of ${distribution^}"
}

install_packages() {
    local missing=() entry
    for entry in "$@"; do
        type -P "${entry%%:*}" >/dev/null || missing+=("${entry#*:}")
    done
    ((${#missing[@]} == 0)) && return
    check_system
    update_lists
    say "installing ${missing[*]}"
    apt_get install -y --no-install-recommends "${missing[@]}"
}

# Also of rustup, which has the programs before it has a compiler.
has_rust() { cargo --version && rustc --version; } &>/dev/null

# Rust, if this release has a package that brings it. The compiler of older releases is too old.
install_rust() {
    check_system
    update_lists
    [[ -n $(apt-cache madison rustup) ]] || return 0
    install_packages rustup:rustup
    say "installing Rust, for $(id -un)"
    rustup default stable
}

need_rust() {
    local needed found
    needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    local how=(
        "Debian 13, Ubuntu 24.04 and newer:  apt-get install rustup && rustup default stable"
        "everywhere:                         see https://rustup.rs"
    )
    has_rust || install_rust
    has_rust || die "Rust is missing: Cubicle is built with Rust $needed or newer" "${how[@]}"
    found=$(rustc --version | cut -d' ' -f2)
    at_least "$found" "$needed" ||
        die "Rust $found is too old: Cubicle is built with Rust $needed or newer" \
            "with rustup:                        rustup update stable" "${how[@]}"
}

main() {
    # First what may have to be reported: nobody should wait for all the packages to be told.
    need_rust
    if ! type -P qemu-system-x86_64 >/dev/null ||
        { [[ ! -e $QEMU_SETTLED ]] && ! at_least "$(qemu_version)" "$QEMU_WANTED"; }; then
        install_qemu
        mkdir -p "${QEMU_SETTLED%/*}"
        touch "$QEMU_SETTLED"
    fi
    install_packages "${RUN_PROGRAMS[@]}"
    if [[ ${1:-} == --test ]]; then
        install_packages "${TEST_PROGRAMS[@]}"
        # Tests start registries of their own. The service that the package brings, open to the
        # whole network, is not wanted.
        type -P docker-registry >/dev/null || {
            install_packages docker-registry:docker-registry
            as_root systemctl disable --now docker-registry 2>/dev/null || true
        }
        python3 -c 'import ensurepip, venv' 2>/dev/null || {
            update_lists
            say "installing python3-venv"
            apt_get install -y --no-install-recommends python3-venv
        }
    fi
}

# Other scripts read this one for its functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
