"""The HTTP API and the gates: what stands on the topics, read into memory and shown (docs/http-api.md)."""
