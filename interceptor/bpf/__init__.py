"""The bpf(2) syscall and the few programs loaded by it; no compiler, no library at run time. Knows no rules, no flows."""
