"""Enable, disable and check capture in one network namespace: facts, plan, backend. All that the CLI and the CNI plugin call."""
