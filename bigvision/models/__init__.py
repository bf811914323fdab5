"""Network factories and the ways to name and load one."""
