"""The Kubernetes API, as far as a node agent needs it: this node's pods, namespaces, events, and a few changes.

Why this is our own client and not the official one: docs/decisions/0013-kube-client.md.
"""
