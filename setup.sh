#!/bin/sh
# Installs what interceptor needs on a bare Debian 12 (or newer), as root: apt packages and the virtual environment.
# --tests: what its tests need, too (a compiler, and servers to test against; none of them is started).
set -eu
cd "$(dirname "$0")"
if [ "$(id -u)" -ne 0 ]; then
    echo "setup.sh: needs root (apt-get, network namespaces)" >&2
    exit 1
fi
wanted='python3 python3-venv nftables iptables iproute2 conntrack curl make procps gcc libc6-dev python3-dev'
case "${1:-}" in
'') ;;
--tests)
    wanted="$wanted clang linux-libc-dev haproxy nginx-light dnsmasq-base kubernetes-client strace"
    if ! setpriv --reuid 65534 --regid 65534 --clear-groups test -r "$PWD/pyproject.toml"; then
        echo "setup.sh: the tests run programs of this directory as other users, who can't read $PWD: put it elsewhere, /opt for example" >&2
        exit 1
    fi
    ;;
*)
    echo "setup.sh: $1: no such option; --tests is the only one" >&2
    exit 2
    ;;
esac
missing=''
for package in $wanted; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
# Any nginx will do, and any kubectl.
if command -v nginx >/dev/null 2>&1; then missing=$(echo "$missing" | sed 's/ nginx-light//'); fi
if command -v kubectl >/dev/null 2>&1; then missing=$(echo "$missing" | sed 's/ kubernetes-client//'); fi
if [ -n "$missing" ]; then
    # Servers would start on this machine's own ports.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of words is meant
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
make -s .venv/.installed
