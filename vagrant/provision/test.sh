#!/bin/sh
# Runs tests in the machine; the log and the exit status stay in the directory $1, for the Vagrantfile to fetch.
# $2: arguments of pytest, of which those that need a backend the machine has not got are for the caller to leave out.
set -eu
results=$1
tests=${2:-tests/netns tests/proxy/test_captured.py}
python=/interceptor/.venv/bin/python
[ -x "$python" ] || python=/opt/venv/bin/python
mkdir -p "$results"
cd /interceptor
export PATH="$PATH:/usr/sbin:/sbin" PYTHONPATH=/interceptor
status=0
{
    uname -a
    "$python" -m interceptor doctor || true
    # shellcheck disable=SC2086  # a list of words is meant
    "$python" -m pytest -q --color=no -m 'not torture' $tests
} >"$results/log" 2>&1 || status=$?
tail -n 15 "$results/log"
echo "$status" >"$results/status"
