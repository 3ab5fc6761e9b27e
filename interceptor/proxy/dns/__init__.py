"""DNS: answers captured queries from a cache or from the configured resolvers, and remembers which name an address had.

wire (bytes) < cache, names < upstreams (who is asked) < exchange (one question's sockets) < resolver (all of it, no client)
< datagrams, streams (the clients). What is not in wire.py reads no message.
"""
