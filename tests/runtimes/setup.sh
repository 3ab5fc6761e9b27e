#!/bin/sh
# Installs the container runtimes that tests/runtimes runs, as root: Debian's own packages, and no service is started.
set -eu
if [ "$(id -u)" -ne 0 ]; then
    echo "tests/runtimes/setup.sh: needs root (apt-get)" >&2
    exit 1
fi
missing=''
for package in podman crun containerd runc containernetworking-plugins busybox-static buildah debootstrap util-linux; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
if [ -n "$missing" ]; then
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
