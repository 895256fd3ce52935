"""`orl doctor` and `orl clean`: what a machine can do, what a run will need, whether it is sound, and what can go."""
