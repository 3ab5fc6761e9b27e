"""The proxy: recovers each captured connection's original destination and moves its bytes. Knows nothing of rules."""
