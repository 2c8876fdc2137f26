"""Profile the time of a training step: `launch/profile.py`."""
