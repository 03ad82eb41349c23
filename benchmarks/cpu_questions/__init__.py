"""Answer the questions of `benchmarks/cpu.py`, one module per question."""
