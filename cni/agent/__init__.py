"""The node agent: a warm process that does for the shim what would take a cold one ten times as long."""
