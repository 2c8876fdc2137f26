"""Sample answers to benchmarks and to held-out problems, grade them, and summarise the grades."""
