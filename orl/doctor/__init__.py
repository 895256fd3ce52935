"""`orl doctor`: what this machine can do, and what a run will need."""
