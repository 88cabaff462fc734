"""The network: vision encoder, connector, text decoder."""
