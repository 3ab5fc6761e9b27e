#!/bin/sh
# Installs what `make kernels` needs on Debian 12 (or newer), as root: an emulator, and what makes root file systems.
set -eu
if [ "$(id -u)" -ne 0 ]; then
    echo "vagrant/qemu/setup.sh: needs root (apt-get)" >&2
    exit 1
fi
missing=''
for package in qemu-system-x86 mmdebstrap e2fsprogs kmod; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
if [ -n "$missing" ]; then
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of words is meant
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
