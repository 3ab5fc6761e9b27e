"""How long `init` and `check` take as whole processes, beside what they cannot avoid. Root; Linux.

Interleaved: each round runs every command once, in a fresh and empty network namespace, so drift of the machine hits all
alike. Prints median, minimum, maximum, and the ratio to `python3 -ISE -c pass` + `nft -f` of the same rules.

    python bench/init.py [ROUNDS]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

INTERCEPTOR = [sys.executable, "-m", "interceptor"]
# 27 rules a family and more: DNS, exclusions, both directions.
OPTIONS = ["--dns", "all", "--exclude-outbound-ports", "22,6000-6100", "--exclude-inbound-ports", "15020,15021,15090",
           "--exclude-outbound-cidrs", "10.96.0.1,fd00:96::1", "--exclude-uids", "5000"]  # fmt: skip
# As installed: bytecode is read from files, not compiled at every start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
NAMESPACE = f"itc-bench-{os.getpid()}"


def timed(argv: list[str]) -> float:
    """Milliseconds of `argv` as a whole process, started directly. Raises when it fails."""
    begin = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    took = (time.perf_counter() - begin) * 1000
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr}")
    return took


def main() -> None:
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rules = subprocess.run(
        [*INTERCEPTOR, "plan", "--format", "nft", *OPTIONS], capture_output=True, text=True, check=True
    ).stdout
    took: dict[str, list[float]] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".nft") as file:
        file.write(rules)
        file.flush()
        into = ["ip", "netns", "exec", NAMESPACE]
        commands = {
            "python3 -ISE -c pass": [sys.executable, "-ISE", "-c", "pass"],
            "nft -f (same rules)": ["nsenter", f"--net=/run/netns/{NAMESPACE}", "nft", "-f", file.name],
            "init, empty namespace": [*INTERCEPTOR, "init", "--netns", NAMESPACE, *OPTIONS],
            "init again, nothing to do": [*INTERCEPTOR, "init", "--netns", NAMESPACE, *OPTIONS],
            "check": [*INTERCEPTOR, "check", "--netns", NAMESPACE, *OPTIONS],
        }
        for _ in range(rounds):
            for name, argv in commands.items():
                if name in ("nft -f (same rules)", "init, empty namespace"):
                    subprocess.run(["ip", "netns", "del", NAMESPACE], capture_output=True, check=False)
                    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
                    subprocess.run([*into, "ip", "link", "set", "lo", "up"], check=True)
                took.setdefault(name, []).append(timed(argv))
    subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)
    floor = statistics.median(took["python3 -ISE -c pass"]) + statistics.median(took["nft -f (same rules)"])
    print(
        f"{rules.count('comment')} rules in one nft table for both families; {rounds} rounds; milliseconds of whole processes"
    )
    print(f"{'command':28} {'median':>8} {'min':>8} {'max':>8} {'ratio to the first two together':>34}")
    for name, values in took.items():
        middle = statistics.median(values)
        print(f"{name:28} {middle:8.1f} {min(values):8.1f} {max(values):8.1f} {middle / floor:34.2f}")


if __name__ == "__main__":
    main()
