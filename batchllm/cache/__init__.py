"""KV memory: blocks and who holds them."""
