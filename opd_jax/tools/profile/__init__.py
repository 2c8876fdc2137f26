"""Where the time of a step goes: `launch/profile.py`."""
