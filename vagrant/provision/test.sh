#!/bin/sh
# Runs tests in the machine; the log and the exit status stay in the directory $1, for the Vagrantfile to fetch.
# $2: "short" or "full", as `make kernels` knows them (vagrant/qemu/suites.py), and arguments of pytest; those that need a backend
# the machine has not got are for the caller to leave out. $3: after so many seconds what was done is summed up, and the status is
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
