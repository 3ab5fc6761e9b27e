#!/bin/sh
# Installs what the tests need and picks the iptables variant: nft, legacy or nft-only. Idempotent; as root, in the machine.
set -eu
firewall=$1
if command -v apt-get >/dev/null; then
    if [ ! -x /opt/venv/bin/pytest ]; then # a box of vagrant/box brings all that; it may have no network
        /interceptor/setup.sh
    fi
    if [ "$firewall" != nft-only ]; then
        update-alternatives --set iptables "/usr/sbin/iptables-$firewall"
        update-alternatives --set ip6tables "/usr/sbin/ip6tables-$firewall"
    fi
else
    python=python3
    # RHEL 9's own is 3.9.
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || python=python3.11
    dnf install -y -q "$python" "$python-devel" "$python-pip" gcc make nftables iproute conntrack-tools curl procps-ng util-linux
    [ "$firewall" = nft-only ] || dnf install -y -q iptables-nft
    # What the tests shape traffic with is not in the base kernel package.
    dnf install -y -q "kernel-modules-$(uname -r)" "kernel-modules-extra-$(uname -r)" || true
    make -s -C /interceptor PYTHON="$python" .venv/.installed
fi
