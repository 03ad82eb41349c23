"""Plan a run before it costs anything: memory, time and the layout of its GPUs, for any model and without its weights."""
