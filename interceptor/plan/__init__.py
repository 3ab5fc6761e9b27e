"""The plan: what the kernel should hold, as data. build makes it, walk follows a packet through it. No I/O."""
