#!/bin/sh
# Installs what interceptor and its tests need on a bare Debian 12 (or newer), as root: apt packages and the virtual environment.
set -eu
cd "$(dirname "$0")"
if [ "$(id -u)" -ne 0 ]; then
    echo "setup.sh: needs root (apt-get, network namespaces)" >&2
    exit 1
fi
missing=''
for package in python3 python3-venv nftables iptables iproute2 conntrack curl make procps gcc libc6-dev python3-dev clang linux-libc-dev; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of words is meant
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
make -s .venv/.installed
