"""Tells chat and CI what was decided: signed webhooks (docs/notify.md)."""
