"""`interceptor demo`: two pods in network namespaces, a real server and a real client, both captured, their flows shown."""
