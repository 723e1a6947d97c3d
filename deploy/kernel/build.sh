#!/usr/bin/env bash
# Builds Cubicle's own guest kernel from the distribution's kernel source and deploy/kernel/config.
# When the source and the configuration are those of the last time, it does nothing.
#
#   deploy/kernel/build.sh              from the newest source package there is (make kernel)
#   deploy/kernel/build.sh PACKAGE      from another one, such as linux-source-6.12
#
# The result is target/kernel/vmlinux. Source and objects stay beside it, for the next build.
set -euo pipefail
# shellcheck source=deploy/setup.sh
. "$(dirname "$0")/../setup.sh"

readonly FRAGMENT=$PWD/deploy/kernel/config
readonly OUT=${CARGO_TARGET_DIR:-target}/kernel
readonly SOURCE=$OUT/source OBJECTS=$OUT/objects LOG=$OUT/build.log
# Says what the source was unpacked from, and what the kernel was built from.
readonly SOURCE_STAMP=$SOURCE/.cubicle-package STAMP=$OUT/vmlinux.made-from

readonly BUILD_PROGRAMS=(
    bc:bc
    bison:bison
    cc:build-essential
    flex:flex
    flock:util-linux
    make:build-essential
    xz:xz-utils
)

# Sets `package`, `version` and `digest` to those of the source package that is wanted, or fails.
find_source() {
    local wanted=${1:-} record
    package=$wanted
    if [[ -z $package ]]; then
        package=$(apt-cache pkgnames linux-source- | grep -E '^linux-source-[0-9.]+$' | sort -V | tail -n 1) ||
            return
    fi
    record=$(apt-cache show --no-all-versions "$package" 2>/dev/null) || return
    version=$(sed -n 's/^Version: //p' <<<"$record")
    digest=$(sed -n 's/^SHA256: //p' <<<"$record")
    [[ -n $version && -n $digest ]]
}

fetch_source() {
    if [[ -e $SOURCE_STAMP && $(<"$SOURCE_STAMP") == "$package $version $digest" ]]; then return; fi
    local draft archive tarball
    # Objects of another source would only be in the way.
    rm -rf "$SOURCE" "$OBJECTS"
    draft=$(mktemp -d "$OUT/draft.XXXXXX")
    say "downloading $package $version"
    # As root, apt would rather download as a user who may not write here.
    if ! (cd "$draft" && apt-get -q -o APT::Sandbox::User=root download "$package=$version"); then
        # The mirror may have dropped what the lists promise.
        update_lists
        find_source "$package" || die "the package $package is gone"
        (cd "$draft" && apt-get -q -o APT::Sandbox::User=root download "$package=$version") ||
            die "cannot download $package $version" "see what apt-get says above"
    fi
    archive=$(find "$draft" -name '*.deb')
    sha256sum --check --status <<<"$digest  $archive" || die "$archive is not the package that the lists promise"
    say "unpacking it"
    dpkg-deb --extract "$archive" "$draft/package"
    tarball=$(find "$draft/package/usr/src" -name 'linux-source-*.tar.*' -type f -print -quit)
    [[ -n $tarball ]] || die "$package has no linux-source-*.tar.* in it"
    mkdir "$draft/source"
    tar --extract --file "$tarball" --directory "$draft/source" --strip-components 1
    echo "$package $version $digest" >"$draft/source/${SOURCE_STAMP##*/}"
    mv "$draft/source" "$SOURCE"
    rm -rf "$draft"
}

# The kernel's own make, quietly. Neither who builds, nor where, nor when is in the result: the same
# kernel twice would be another one to every template.
kernel_make() {
    nice -n 10 make --no-print-directory -C "$SOURCE" O="$(realpath "$OBJECTS")" ARCH=x86_64 CROSS_COMPILE= \
        KBUILD_BUILD_USER=cubicle KBUILD_BUILD_HOST=cubicle KBUILD_BUILD_VERSION=1 \
        KBUILD_BUILD_TIMESTAMP="$(date --utc --date="@$(stat --format %Y "$SOURCE/Makefile")")" \
        -j"$(nproc)" "$@" >>"$LOG" 2>&1
}

# What the fragment asks for and the configuration does not have.
unmet() {
    local line name found
    while read -r line; do
        if [[ $line =~ ^'# '(CONFIG_[A-Za-z0-9_]+)' is not set'$ ]]; then
            name=${BASH_REMATCH[1]}
            found=$(grep "^$name=" "$OBJECTS/.config") || continue
            echo "$line, but it is: $found"
        elif [[ $line == CONFIG_* ]] && ! grep -qxF -- "$line" "$OBJECTS/.config"; then
            name=${line%%=*}
            found=$(grep -E "^(# )?${name}[= ]" "$OBJECTS/.config") || found="not to be had with the other options"
            echo "$line, but it is: ${found#\# }"
        fi
    done <"$FRAGMENT"
}

configure() {
    local missing
    mkdir -p "$OBJECTS"
    KCONFIG_ALLCONFIG=$FRAGMENT kernel_make allnoconfig ||
        die "the kernel cannot be configured" "$(tail -n 5 "$LOG")" "more is in $LOG"
    missing=$(unmet)
    [[ -z $missing ]] || die "$package $version does not take all of deploy/kernel/config:" "$missing"
}

usage() {
    say "$OUT/vmlinux: Linux $release, $(du --apparent-size --block-size=MB "$OUT/vmlinux" | cut -f1)"
    echo "    Use it with: cubicle up --kernel $OUT/vmlinux"
}

main() {
    local inputs release
    # What a make around this one has decided is not for the kernel's.
    unset MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES KCONFIG_CONFIG KBUILD_OUTPUT KCFLAGS
    export LC_ALL=C
    check_system
    find_source "${1:-}" || {
        update_lists
        find_source "${1:-}" || die "no configured package source has ${1:-a package linux-source-<version>}"
    }
    mkdir -p "$OUT"
    exec 9>"$OUT/.lock"
    flock 9
    trap 'rm -rf "$OUT"/draft.* "$OUT/vmlinux.draft"' EXIT
    inputs="$package $version $digest $(cat "$FRAGMENT" "deploy/kernel/build.sh" | sha256sum | cut -d' ' -f1)"
    if [[ -e $OUT/vmlinux && -e $STAMP && $(head -n 1 "$STAMP") == "$inputs" ]]; then
        release=$(tail -n 1 "$STAMP")
        usage
        return
    fi

    install_packages "${BUILD_PROGRAMS[@]}"
    # A header is no program.
    if ! cc -E -include gelf.h -x c /dev/null >/dev/null 2>&1; then
        update_lists
        say "installing libelf-dev"
        apt_get install -y --no-install-recommends libelf-dev
    fi
    fetch_source
    # The lists may have been refreshed for it.
    inputs="$package $version $digest ${inputs##* }"
    : >"$LOG"
    configure
    say "compiling Linux $version: some 10 minutes on 2 processors"
    kernel_make vmlinux || die "the kernel does not compile" "$(grep -E 'error|Error' "$LOG" | tail -n 5)" "more is in $LOG"
    release=$(<"$OBJECTS/include/config/kernel.release")
    strip --strip-all -o "$OUT/vmlinux.draft" "$OBJECTS/vmlinux"
    rm -f "$STAMP"
    mv "$OUT/vmlinux.draft" "$OUT/vmlinux"
    printf '%s\n%s\n' "$inputs" "$release" >"$STAMP"
    usage
}

main "$@"
