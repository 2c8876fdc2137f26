"""Sample the teacher's solutions as golden data for a cold start by SFT: `launch/sample.py`."""
