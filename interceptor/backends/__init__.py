"""What puts a Plan into the kernel and reads it back: nft, iptables (nft or legacy), libiptc, and routes for all of them."""
