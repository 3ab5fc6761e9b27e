"""Transparent traffic interception for Linux. The version, nothing else: this module is on the CNI path."""

__version__ = "0.1.0"
