#!/bin/sh
# Runs tests in the machine; the log and the exit status stay in the directory $1, for the Vagrantfile to fetch.
# $2: "short" or "full", as `make kernels` knows them (vagrant/qemu/suites.py), and arguments of pytest; tests by iptables are left
# out of both where it is not installed. $3: after so many seconds what was done is summed up, and the status is
# 124; 0 is never.
set -eu
results=$1
tests=$2
limit_s=$3
python=/interceptor/.venv/bin/python
[ -x "$python" ] || python=/opt/venv/bin/python
mkdir -p "$results" /out # where the tests of make kernels leave files
cd /interceptor
export PATH="$PATH:/usr/sbin:/sbin"
KERNEL=$(uname -r | cut -d. -f-2)
export KERNEL
# Else the tests take it for a machine where something is missing.
if ! command -v iptables >/dev/null; then export NFT_ONLY=1; fi
"$python" -m vagrant.qemu.suites "$KERNEL" "$tests" >"$results/arguments"
status=0
{
    uname -a
    "$python" -m interceptor doctor || true
    # pytest sums up when it is interrupted.
    timeout --signal=INT --kill-after=120 "$limit_s" \
        "$python" -m pytest -q --color=no -m 'not torture' "@$results/arguments"
} >"$results/log" 2>&1 || status=$?
tail -n 15 "$results/log"
echo "$status" >"$results/status"
