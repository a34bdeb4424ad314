"""Replays a file of impressions through a broker and the service."""
