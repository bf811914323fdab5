"""One file a job: everything the command line can start."""
