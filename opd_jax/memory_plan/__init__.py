"""What a run will take before it takes it: memory of each stage, time of a step."""
