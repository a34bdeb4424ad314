"""Adaptive traffic weights: from each arm's evidence to the shares of the next weight epoch. Pure; nothing is drawn."""
