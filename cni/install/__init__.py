"""Put the plugin on a node: binary, then agent's socket, then conflist; keep it there; take it away as if it had never been."""
