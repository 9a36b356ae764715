"""Frontends: what turns a user's model into a graph of the IR."""
