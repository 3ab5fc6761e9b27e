"""Text of a Plan, for people and for the kernel's own programs. No I/O; applying it is the backends' business."""
