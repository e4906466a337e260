"""Routed experts: router, experts, block, losses, upcycling."""
