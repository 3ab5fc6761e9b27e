"""What ours is called in the kernel: enough to find it, without any renderer. Pure."""

from __future__ import annotations

NFT_TABLE = "interceptor"
# A set that holds nothing, or one element: whether the proxy has announced itself. Its key must be of some packet's value, and
# the same for all packets: no bit of their mark.
NFT_ANNOUNCED = "announced"
IPTABLES_PREFIX = "INTERCEPT_"
# A list of xt_recent that holds nothing, or one entry a family: whether the proxy has announced itself. Entries are addresses
# under the mask: of everybody's nothing is left.
IPTABLES_ANNOUNCED = "interceptor"
