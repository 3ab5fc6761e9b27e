"""DNS: answers captured queries from a cache or from the configured resolvers, and remembers which name an address had.

messages (a library's) < cache, names < upstreams (who is asked) < ports (from which socket) < exchange (one question's tries)
< resolver (all of it, no client) < datagrams, streams (the clients). What is not in messages.py reads no message.
"""
