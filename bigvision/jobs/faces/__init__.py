"""What the face jobs are made of: one concept a file."""
