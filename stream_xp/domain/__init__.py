"""What an exposure, a reward, an experiment, a statistic and a decision are, and their form on the wire."""
