"""The byte path between the two sides of a flow. One protocol (`base`), several implementations; `copy` is the oracle."""
