"""Filter, split and decontaminate training problems: `launch/prepare_data.py`."""
