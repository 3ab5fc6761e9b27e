#!/bin/sh
# Installs what tests/runtimes and tests/deploy need, as root: Debian's container runtimes, no service started; Go; a few Python packages.
set -eu
cd "$(dirname "$0")/../.."
if [ "$(id -u)" -ne 0 ]; then
    echo "tests/runtimes/setup.sh: needs root (apt-get)" >&2
    exit 1
fi
missing=''
for package in podman crun containerd runc containernetworking-plugins busybox-static buildah debootstrap golang-go; do
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
make -s .venv/.installed
.venv/bin/pip install --quiet --disable-pip-version-check -r tests/runtimes/requirements.txt
