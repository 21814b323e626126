"""Responses from an inference engine: its interface, the SGLang client, servers on this machine, drop policies."""
